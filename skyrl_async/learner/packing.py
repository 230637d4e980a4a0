"""Packing: sequences share rows of one length, so that next to nothing is computed on padding.

Shapes: ``N`` rows, ``R`` tokens per row, ``L`` loss tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
        sequence_ids: ``[N, R]`` int64, the sequence of the row that a token is of; -1 is padding.
        source: ``[L]`` int64, index into ``N * R`` of the token *before* each loss token, whose
            logits predict it.
        targets: ``[L]`` int64, the loss tokens.
        behavior_logprobs: ``[L]``.
        advantages: ``[L]``.
        policy_versions: ``[L]`` int64.
        prefix_versions: ``[L]`` int64, the oldest version that sampled the token or one before it.
        temperature: ``[L]``.
    """

    token_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    source: Tensor
    targets: Tensor
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
        """Return ``[N, 1, R, R]`` bool: causal within a sequence, nothing between sequences.

        A padding token attends to itself, so that no row of the softmax is empty.
        """
        ids = self.sequence_ids
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(1)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        diagonal = torch.eye(length, dtype=torch.bool)
        return ((same & causal) | diagonal).unsqueeze(1)


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


def pack(
    sequences: Sequence[TrainSequence],
    *,
    tokens_per_microbatch: int,
    dtype: torch.dtype = torch.float32,
) -> list[Microbatch]:
    """Pack sequences into microbatches of about ``tokens_per_microbatch`` tokens.

    Every token of every sequence is in exactly one microbatch. No sequences give no microbatches.

    Args:
        sequences: in any order.
        tokens_per_microbatch: rows are added to a microbatch up to this many tokens; one row is
            allowed even if it is longer.
        dtype: of the floating-point tensors.
    """
    if not sequences:
        return []
    lengths = [len(s.token_ids) for s in sequences]
    row_tokens = max(MIN_ROW_TOKENS, *lengths)
    rows = fill_rows(lengths, row_tokens=row_tokens)
    rows_each = max(1, tokens_per_microbatch // row_tokens)
    microbatches = []
    for start in range(0, len(rows), rows_each):
        chunk = [[sequences[i] for i in row] for row in rows[start : start + rows_each]]
        width = max(sum(len(s.token_ids) for s in row) for row in chunk)
        microbatches.append(_to_tensors(chunk, width=width, dtype=dtype))
    return microbatches


def _to_tensors(rows: list[list[TrainSequence]], *, width: int, dtype: torch.dtype) -> Microbatch:
    """Lay out rows of sequences ``[N, width]`` and gather their loss tokens."""
    shape = (len(rows), width)
    token_ids = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    ids = np.full(shape, -1, np.int64)
    parts: dict[str, list[Any]] = {
        name: []
        for name in (
            *("source", "targets", "behavior", "advantages"),
            *("versions", "prefix", "temperature"),
        )
    }
    for n, row in enumerate(rows):
        start = 0
        for s, sequence in enumerate(row):
            length = len(sequence.token_ids)
            span = slice(start, start + length)
            token_ids[n, span] = sequence.token_ids
            positions[n, span] = np.arange(length)
            ids[n, span] = s
            where = np.flatnonzero(sequence.loss_mask)
            parts["source"].append(where + (n * width + start - 1))
            parts["targets"].append(sequence.token_ids[where])
            parts["behavior"].append(sequence.behavior_logprobs[where])
            parts["advantages"].append(sequence.advantages[where])
            versions = sequence.policy_versions
            oldest = np.minimum.accumulate(np.where(versions < 0, _NEWEST, versions))
            parts["versions"].append(versions[where])
            parts["prefix"].append(oldest[where])
            parts["temperature"].append(np.full(len(where), sequence.temperature))
            start += length

    def gathered(name: str, as_type: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts[name])).to(as_type)

    return Microbatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(positions),
        sequence_ids=torch.from_numpy(ids),
        source=gathered("source", torch.int64),
        targets=gathered("targets", torch.int64),
        behavior_logprobs=gathered("behavior", dtype),
        advantages=gathered("advantages", dtype),
        policy_versions=gathered("versions", torch.int64),
        prefix_versions=gathered("prefix", torch.int64),
        temperature=gathered("temperature", dtype),
    )
