"""Attention from the packed tokens of one step to the KV slots of their rows.

Rows with similar numbers of new tokens share one call. It is plain matrix products: for the small
matrices of a slot they are faster on a CPU than fused attention, and they read each key once for
all query heads that share it. Long prompts are taken in parts, so that the scores stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_SCORES_BYTES = 64 << 20
"""Of the scores of one part of a prompt, in float32."""

_NEGATIVE_INFINITY = float("-inf")

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What differs from layer to layer.

    Attributes:
        scale: of the scores.
        softcap: scores are ``softcap * tanh(score / softcap)``; None for no cap.
        window: tokens that one can see, itself included; None for all.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


def to_device(values: IntArray, device: torch.device) -> Tensor:
    """Copy a few integers to ``device``, without waiting for what it computes."""
    # Small copies from pageable memory are staged by the driver, so the source is free at once.
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


@dataclass(slots=True, kw_only=True)
class Bucket:
    """Rows with similar numbers of new tokens, which share one attention call.

    Attributes:
        tokens: range of the packed tokens ``[T]`` that belong to it.
        slots: the slots to read, a slice where they lie close together; ``R`` of them.
        query_length: ``Q``, new tokens per slot after padding.
        first_position: smallest of the tokens' positions.
        kv_length: ``L``, positions to read.
        gather: ``[R * Q]``, packed token (relative to ``tokens``) of each padded query, or None if
            that is the identity.
        scatter: ``[T]``, the padded query of each packed token.
        positions: ``[R, Q]``, of each padded query.
        masks: additive masks of whole calls, by what they depend on.
    """

    tokens: slice
    slots: slice | Tensor
    query_length: int
    first_position: int
    kv_length: int
    gather: Tensor | None
    scatter: Tensor
    positions: Tensor
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
        """Attend from packed queries ``[T, heads, D]`` to slots; return ``[T, heads, D_v]``."""
        heads, kv_heads = query.shape[1], keys.shape[1]
        repeats, length = heads // kv_heads, self.query_length
        keys, values = (self._read(store, kind.window) for store in (keys, values))
        if self.gather is not None:
            query = query.index_select(0, self.gather)
        query = query.view(-1, length, kv_heads, repeats, query.shape[2]).transpose(1, 2)
        parts = []
        for part in self._parts(rows=query.shape[0], heads=heads, kv_length=keys.shape[1]):
            mask = self._mask(part, kv_heads, repeats, kind.window, query.dtype)
            parts.append(_attend(query[:, :, part], keys, values, mask, kind))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        out = out.transpose(1, 2).reshape(-1, heads, out.shape[4])
        return out if self.gather is None else out.index_select(0, self.scatter)

    def _first_key(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.first_position - window + 1)

    def _read(self, store: Tensor, window: int | None) -> Tensor:
        """Return what the queries may see, ``[R * kv_heads, L, D]``."""
        seen = slice(self._first_key(window), self.kv_length)
        if isinstance(self.slots, slice):
            return store[self.slots, :, seen].flatten(0, 1)
        return store[:, :, seen].index_select(0, self.slots).flatten(0, 1)

    def _parts(self, *, rows: int, heads: int, kv_length: int) -> Iterator[slice]:
        bytes_per_query = 4 * rows * heads * kv_length
        step = max(1, MAX_SCORES_BYTES // bytes_per_query)
        for start in range(0, self.query_length, step):
            yield slice(start, min(start + step, self.query_length))

    def _mask(
        self, part: slice, kv_heads: int, repeats: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """Return 0 where a query may look and -inf elsewhere, ``[R * kv_heads, Q * repeats, L]``.

        One of all queries is made once and shared by the layers.
        """
        whole = part.stop - part.start == self.query_length
        key = (kv_heads, repeats, window, dtype)
        if whole and key in self.masks:
            return self.masks[key]
        positions = self.positions[:, part].unsqueeze(-1)
        columns = torch.arange(self._first_key(window), self.kv_length, device=positions.device)
        hidden = columns > positions
        if window is not None:
            hidden |= columns <= positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, _NEGATIVE_INFINITY)
        mask = mask[:, None, :, None].expand(-1, kv_heads, -1, repeats, -1)
        mask = mask.reshape(-1, (part.stop - part.start) * repeats, mask.shape[-1])
        if whole:
            self.masks[key] = mask
        return mask


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, kind: AttentionKind
) -> Tensor:
    """Attend from ``[R, kv_heads, Q, repeats, D]``; return the same with the size of a value."""
    shape = query.shape
    # All query heads of one key-value head attend together, which spares copies of the keys.
    query = query.reshape(-1, shape[2] * shape[3], shape[4])
    if kind.softcap is None:
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=kind.scale)
    else:
        scores = torch.bmm(query, keys.transpose(1, 2)) * (kind.scale / kind.softcap)
        scores = scores.tanh_().mul_(kind.softcap).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(weights, values).view(*shape[:4], values.shape[2])


def make_buckets(
    slots: IntArray,
    starts: IntArray,
    counts: IntArray,
    positions: IntArray,
    *,
    device: torch.device,
) -> list[Bucket]:
    """Plan the attention calls of one step.

    Args:
        slots: of each row.
        starts: position of the first new token of each row.
        counts: new tokens of each row, ascending.
        positions: of the packed tokens, in order of the rows.
        device: of the slots.
    """
    ends = counts.cumsum()
    buckets = []
    for first, last in _ranges(counts):
        rows = slice(first, last)
        tokens = slice(int(ends[first] - counts[first]), int(ends[last - 1]))
        buckets.append(
            _make_bucket(slots[rows], starts[rows], counts[rows], positions[tokens], tokens, device)
        )
    return buckets


def _ranges(counts: IntArray) -> list[tuple[int, int]]:
    """Split ascending ``counts`` where padding to the largest would more than double the work."""
    first, last = int(counts[0]), int(counts[-1])
    if first == last:
        return [(0, len(counts))]
    ranges, start = [], 0
    while start < len(counts):
        smallest = int(counts[start])
        limit = 1 if smallest == 1 else 2 * smallest + 16
        end = int(np.searchsorted(counts, limit, side="right"))
        ranges.append((start, end))
        start = end
    return ranges


def _make_bucket(
    slots: IntArray,
    starts: IntArray,
    counts: IntArray,
    positions: IntArray,
    tokens: slice,
    device: torch.device,
) -> Bucket:
    """Plan one attention call; ``positions`` are those of the tokens, the others of the rows."""
    low, length = int(slots.min()), int(counts[-1])
    span = int(slots.max()) - low + 1
    # Reading unused slots in between costs less than copying the used ones, if they are few.
    dense = 2 * span <= 3 * len(slots)
    num_rows = span if dense else len(slots)
    scatter = slots - low if dense else np.arange(len(slots))
    if length > 1:
        scatter = np.repeat(scatter * length - starts, counts) + positions
    identity = np.array_equal(scatter, np.arange(num_rows * length))
    padded_positions, gather = positions, None
    if not identity:
        gather = np.zeros(num_rows * length, np.int64)
        gather[scatter] = np.arange(len(scatter))
        padded_positions = np.full(num_rows * length, int(positions.min()), np.int64)
        padded_positions[scatter] = positions
    return Bucket(
        tokens=tokens,
        slots=slice(low, low + span) if dense else to_device(slots, device),
        query_length=length,
        first_position=int(positions.min()),
        kv_length=int(positions.max()) + 1,
        gather=None if gather is None else to_device(gather, device),
        scatter=to_device(scatter, device),
        positions=to_device(padded_positions, device).view(num_rows, length),
    )
