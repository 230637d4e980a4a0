"""Packing: sequences share rows of one length, and tokens of a common beginning are computed once.

Sequences that begin alike, such as the members of a group with their prompt, become a tree in one
row: a token of which several sequences have the same context, itself included, is there once, and
attention goes from a token to its ancestors. The logprobs and the gradient are those of every
sequence alone. For example, two replies ``7 .`` and ``5 .`` to the prompt ``u m a``::

    token_ids     u m a 5 7      the last token of each sequence predicts nothing and is left out
    position_ids  0 1 2 3 3
    subtree_ends  5 5 5 4 5      ``5`` (at index 3) is seen by nothing at or after index 4

Shapes: ``N`` rows, ``R`` tokens per row, ``L`` loss tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyrl_async.types import TrainSequence

MIN_ROW_TOKENS = 64
"""Rows are at least this long, so that short sequences fill them closely."""

_NEWEST = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass needs, as tensors.

    Attributes:
        token_ids: ``[N, R]`` int64.
        position_ids: ``[N, R]`` int64, counted from the start of each sequence.
        subtree_ends: ``[N, R]`` int64, index in the row after the last token that has this one in
            its context; after itself for a token that only sees itself, as padding does.
        source: ``[L]`` int64, index into ``N * R`` of the token *before* each loss token, whose
            logits predict it.
        targets: ``[L]`` int64, the loss tokens.
        index: ``[L]`` int64, their places among the loss tokens of all sequences, end to end in the
            order that the packer was told.
        behavior_logprobs: ``[L]``.
        advantages: ``[L]``.
        policy_versions: ``[L]`` int64.
        prefix_versions: ``[L]`` int64, the oldest version that sampled the token or one before it.
        temperature: ``[L]``.
    """

    token_ids: Tensor
    position_ids: Tensor
    subtree_ends: Tensor
    source: Tensor
    targets: Tensor
    index: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    policy_versions: Tensor
    prefix_versions: Tensor
    temperature: Tensor

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return self.targets.numel()

    def attention_mask(self) -> Tensor:
        """Return ``[N, 1, R, R]`` bool: from every token to itself and its ancestors."""
        index = torch.arange(self.token_ids.shape[1])
        causal = index <= index.unsqueeze(1)
        inside = index.unsqueeze(1) < self.subtree_ends.unsqueeze(1)
        return (causal & inside).unsqueeze(1)


def fill_rows(lengths: Sequence[int], *, row_tokens: int) -> list[list[int]]:
    """Return rows of sequence indices, each of at most ``row_tokens`` tokens (best fit decreasing).

    Raises:
        ValueError: if a sequence is longer than a row.
    """
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit rows of {row_tokens}")
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        room = next((r for r in range(length, row_tokens + 1) if rows_by_room.get(r)), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, row_tokens
        else:
            row = rows_by_room[room].pop()
        rows[row].append(index)
        rows_by_room.setdefault(room - length, []).append(row)
    return rows


def split_evenly(lengths: Sequence[int], *, num_parts: int) -> list[list[int]]:
    """Return ``num_parts`` lists of indices with nearly equal numbers of tokens (longest first)."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += lengths[index]
    return parts


@dataclass(frozen=True, slots=True)
class _Branch:
    """One sequence of a tree.

    Attributes:
        sequence: what it is of.
        num_context: tokens of it that predict a loss token, or precede one that does.
        first_index: place of its first loss token among those of all sequences.
        num_shared: of the tokens in context, the ones that the branch before it has too.
    """

    sequence: TrainSequence
    num_context: int
    first_index: int
    num_shared: int = 0

    @property
    def num_new(self) -> int:
        """Tokens that it adds to its tree."""
        return self.num_context - self.num_shared


def first_loss_indices(sequences: Sequence[TrainSequence]) -> list[int]:
    """Return the place of each sequence's first loss token among those of all, end to end."""
    lengths = [int(s.loss_mask.sum()) for s in sequences]
    return list(accumulate(lengths, initial=0))[:-1]


def pack(
    sequences: Sequence[TrainSequence],
    *,
    tokens_per_microbatch: int,
    dtype: torch.dtype = torch.float32,
    first_indices: Sequence[int] | None = None,
) -> list[Microbatch]:
    """Pack sequences into microbatches of about ``tokens_per_microbatch`` computed tokens.

    Every loss token of every sequence is in exactly one microbatch. Beginnings are merged unless
    rows of separate sequences are fewer. No sequences give no microbatches.

    Args:
        sequences: in any order, each with a loss token.
        tokens_per_microbatch: rows are added to a microbatch up to this many tokens; one row is
            allowed even if it is longer.
        dtype: of the floating-point tensors.
        first_indices: place of each sequence's first loss token among those of a larger batch;
            without them, ``sequences`` is the batch.
    """
    if not sequences:
        return []
    if first_indices is None:
        first_indices = first_loss_indices(sequences)
    branches = [
        _Branch(s, int(np.flatnonzero(s.loss_mask)[-1]), first)
        for s, first in zip(sequences, first_indices, strict=True)
    ]
    row_tokens = max(MIN_ROW_TOKENS, *(branch.num_context for branch in branches))
    merged = _fill(_grow_trees(branches, max_tokens=row_tokens), row_tokens=row_tokens)
    separate = _fill([[branch] for branch in branches], row_tokens=row_tokens)
    rows = min(merged, separate, key=len)
    rows_each = max(1, tokens_per_microbatch // row_tokens)
    return [
        _to_tensors(rows[start : start + rows_each], dtype=dtype)
        for start in range(0, len(rows), rows_each)
    ]


def _grow_trees(branches: Sequence[_Branch], *, max_tokens: int) -> list[list[_Branch]]:
    """Merge branches into trees; in each, they are sorted by their tokens.

    Sorted so, a branch shares no more with any other one before it than with the one just before.
    """
    big_endian = [b.sequence.token_ids[: b.num_context].astype(">i4") for b in branches]
    keys = [ids.tobytes() for ids in big_endian]
    trees: list[list[_Branch]] = []
    room = 0
    before = big_endian[0][:0]
    for index in sorted(range(len(branches)), key=keys.__getitem__):
        branch = branches[index]
        shared = _common_length(before, big_endian[index])
        if not shared or branch.num_context - shared > room:
            trees.append([])
            room, shared = max_tokens, 0
        branch = replace(branch, num_shared=shared)
        trees[-1].append(branch)
        room -= branch.num_new
        before = big_endian[index]
    return trees


def _common_length(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _fill(trees: Sequence[list[_Branch]], *, row_tokens: int) -> list[list[_Branch]]:
    sizes = [sum(branch.num_new for branch in tree) for tree in trees]
    rows = fill_rows(sizes, row_tokens=row_tokens)
    return [[branch for tree in row for branch in trees[tree]] for row in rows]


def _to_tensors(rows: Sequence[list[_Branch]], *, dtype: torch.dtype) -> Microbatch:
    """Lay out trees ``[N, width]`` and gather their loss tokens."""
    width = max(sum(branch.num_new for branch in row) for row in rows)
    shape = (len(rows), width)
    token_ids = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    places: list[NDArray[np.int64]] = []
    for n, row in enumerate(rows):
        stop = 0
        path = np.zeros(0, np.int64)
        for branch in row:
            start, stop = stop, stop + branch.num_new
            first, last = branch.num_shared, branch.num_context
            path = np.concatenate([path[:first], np.arange(start, stop)])
            token_ids[n, start:stop] = branch.sequence.token_ids[first:last]
            positions[n, start:stop] = np.arange(first, last)
            ends[n, path] = stop
            places.append(path + n * width)
    loss = _loss_tokens([branch for row in rows for branch in row], places)
    floats = {name: torch.from_numpy(loss[name]).to(dtype) for name in _FLOATS}
    longs = {name: torch.from_numpy(loss[name]).to(torch.int64) for name in _LONGS}
    return Microbatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(positions),
        subtree_ends=torch.from_numpy(ends),
        **longs,
        **floats,
    )


_FLOATS = ("behavior_logprobs", "advantages", "temperature")
_LONGS = ("source", "targets", "index", "policy_versions", "prefix_versions")


def _loss_tokens(
    branches: Sequence[_Branch], places: Sequence[NDArray[np.int64]]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a microbatch that have one value per loss token.

    Args:
        branches: of all rows.
        places: of the context of each branch, as indices into the rows laid end to end.
    """

    def predicted(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(b.sequence, name)[1 : b.num_context + 1] for b in branches])

    lengths = [branch.num_context for branch in branches]
    where = np.flatnonzero(predicted("loss_mask"))
    versions = predicted("policy_versions")
    sampled = np.where(versions < 0, _NEWEST, versions)
    temperatures = np.repeat([branch.sequence.temperature for branch in branches], lengths)
    return {
        "source": np.concatenate(places)[where],
        "targets": predicted("token_ids")[where],
        "index": np.concatenate(
            [np.arange(b.first_index, b.first_index + b.sequence.loss_mask.sum()) for b in branches]
        ),
        "behavior_logprobs": predicted("behavior_logprobs")[where],
        "advantages": predicted("advantages")[where],
        "temperature": temperatures[where],
        "policy_versions": versions[where],
        "prefix_versions": _minima_so_far(sampled, lengths)[where],
    }


def _minima_so_far(values: NDArray[np.integer], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the cumulative minimum of int32 values, anew in each segment of ``lengths``."""
    # Every segment is moved below the one before it.
    offsets = np.repeat(np.arange(len(lengths)) << 32, lengths)
    return np.minimum.accumulate(values - offsets) + offsets
