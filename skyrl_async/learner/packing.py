"""Packing: many sequences in few rows, with next to no padding, in one of two layouts.

*Flat*: all sequences of a microbatch stand end to end in one row, and each sees only itself. This
is the layout of attention kernels for segments, and of long sequences.

*Tree*: sequences share rows of one length, and tokens of a common beginning are computed once.
Sequences that begin alike, such as the members of a group with their prompt, become a tree in one
row: a token of which several sequences have the same context, itself included, is there once, and
attention goes from a token to its ancestors. The logprobs and the gradient are those of every
sequence alone. For example, two replies ``7 .`` and ``5 .`` to the prompt ``u m a``::

    token_ids     u m a 5 7      the last token of each sequence predicts nothing and is left out
    position_ids  0 1 2 3 3
    subtree_ends  5 5 5 4 5      ``5`` (at index 3) is seen by nothing at or after index 4

Costs are in tokens: what a token costs without attention is 1, and a pair of tokens, one of which
sees the other, costs ``pair_cost``.

Shapes: ``N`` rows, ``R`` tokens per row, ``L`` loss tokens of a microbatch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from skyrl_async.learner.microbatch import FLOAT_FIELDS, LONG_FIELDS, Microbatch
from skyrl_async.learner.microbatch import empty_microbatch as empty_microbatch
from skyrl_async.learner.segments import SegmentGeometry
from skyrl_async.types import TrainSequence

Layout = Literal["auto", "tree", "flat"]

MIN_ROW_TOKENS = 64
"""Rows are at least this long, so that short sequences fill them closely."""

SEGMENT_COST = 8.0
"""What a sequence of a flat row costs on top, in tokens: gathering and padding it."""

PAIR_COST = 0.0035
"""Of the built-in policy, by :func:`pair_cost_of`; measured on a CPU, 0.003."""

_NEWEST = np.iinfo(np.int32).max


def fill_rows(lengths: Sequence[int], *, row_tokens: int) -> list[list[int]]:
    """Return rows of sequence indices, each of at most ``row_tokens`` tokens (best fit decreasing).

    Raises:
        ValueError: if a sequence is longer than a row.
    """
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit rows of {row_tokens}")
    rows: list[list[int]] = []
    # Rows by the room left in them, smallest first.
    open_rows: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(open_rows, (lengths[index],))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > lengths[index]:
            insort(open_rows, (room - lengths[index], row))
    return rows


def pair_cost_of(config: Any) -> float:
    """Return what a pair of tokens costs in a ``transformers`` causal LM, in tokens.

    Of one layer: a pair takes ``4 A D`` floating-point operations (``A`` heads of width ``D``: a
    logit, and a weighted value), a token twice as many as there are weights at work, so the cost
    is ``2 A D`` over these weights. Of a mixture of experts, those of one token are at work.

    Args:
        config: of the model; a gated MLP is assumed.
    """
    config = config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = config.intermediate_size
    if getattr(config, "num_experts_per_tok", None):
        inner = getattr(config, "moe_intermediate_size", inner) * config.num_experts_per_tok
    weights = 2 * width * head_dim * (heads + kv_heads) + 3 * width * inner
    return 2 * heads * head_dim / weights


def sequence_cost(length: int, *, pair_cost: float = PAIR_COST) -> float:
    """Return what a sequence of ``length`` tokens costs by itself, in tokens."""
    return length + pair_cost * length * (length + 1) / 2


def split_by_cost(
    lengths: Sequence[int], *, num_parts: int, pair_cost: float = PAIR_COST
) -> list[list[int]]:
    """Return ``num_parts`` lists of indices with nearly equal costs (longest first)."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0.0] * num_parts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += sequence_cost(lengths[index], pair_cost=pair_cost)
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
    layout: Layout = "tree",
    pair_cost: float = PAIR_COST,
) -> list[Microbatch]:
    """Pack sequences into microbatches of about ``tokens_per_microbatch`` computed tokens.

    Every loss token of every sequence is in exactly one microbatch. No sequences give no
    microbatches.

    Args:
        sequences: in any order, each with a loss token.
        tokens_per_microbatch: a microbatch has no more, or is one tree row, or has no more than
            the longest sequence.
        dtype: of the floating-point tensors.
        first_indices: place of each sequence's first loss token among those of a larger batch;
            without them, ``sequences`` is the batch.
        layout: ``flat``, ``tree``, or ``auto`` for the one that costs less.
        pair_cost: of the model, see :func:`pair_cost_of`.
    """
    if not sequences:
        return []
    if first_indices is None:
        first_indices = first_loss_indices(sequences)
    branches = [
        _Branch(s, int(np.flatnonzero(s.loss_mask)[-1]), first)
        for s, first in zip(sequences, first_indices, strict=True)
    ]
    if layout != "flat":
        rows = _tree_rows(branches)
        width = _width(rows)
        if layout == "tree" or _tree_cost(rows, pair_cost) <= _flat_cost(branches, pair_cost):
            rows_each = max(1, tokens_per_microbatch // width)
            return [
                _to_tensors(rows[start : start + rows_each], dtype=dtype)
                for start in range(0, len(rows), rows_each)
            ]
    lengths = [branch.num_context for branch in branches]
    filled = fill_rows(lengths, row_tokens=max(tokens_per_microbatch, *lengths))
    return [_flat([branches[i] for i in row], dtype=dtype) for row in filled]


def _tree_rows(branches: Sequence[_Branch]) -> list[list[_Branch]]:
    """Return rows of trees; of separate sequences if these are fewer."""
    row_tokens = max(MIN_ROW_TOKENS, *(branch.num_context for branch in branches))
    merged = _fill(_grow_trees(branches, max_tokens=row_tokens), row_tokens=row_tokens)
    separate = _fill([[branch] for branch in branches], row_tokens=row_tokens)
    return min(merged, separate, key=len)


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


def _to_tensors(
    rows: Sequence[list[_Branch]], *, dtype: torch.dtype, segments: SegmentGeometry | None = None
) -> Microbatch:
    """Lay out trees ``[N, width]`` and gather their loss tokens."""
    width = _width(rows)
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
    return Microbatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(positions),
        subtree_ends=torch.from_numpy(ends),
        segments=segments,
        **{name: torch.from_numpy(loss[name]).to(torch.int64) for name in LONG_FIELDS},
        **{name: torch.from_numpy(loss[name]).to(dtype) for name in FLOAT_FIELDS},
    )


def _flat(row: Sequence[_Branch], *, dtype: torch.dtype) -> Microbatch:
    """Lay out sequences end to end; a row of trees that share nothing is that."""
    segments = SegmentGeometry.of([branch.num_context for branch in row])
    return _to_tensors([list(row)], dtype=dtype, segments=segments)


def _width(rows: Sequence[Sequence[_Branch]]) -> int:
    return max(sum(branch.num_new for branch in row) for row in rows)


def _tree_cost(rows: Sequence[Sequence[_Branch]], pair_cost: float) -> float:
    # A mask spares nothing: all pairs of a row are computed.
    width = _width(rows)
    return len(rows) * width * (1 + pair_cost * width)


def _flat_cost(branches: Sequence[_Branch], pair_cost: float) -> float:
    costs = (sequence_cost(b.num_context, pair_cost=pair_cost) for b in branches)
    return sum(costs) + SEGMENT_COST * len(branches)


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
