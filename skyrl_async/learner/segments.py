"""Where sequences lie in a flat row ``[1, T]``, in which they stand end to end.

Shapes: ``T`` tokens of the row, ``S`` segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FILL = 0.8
"""Segments of a bucket are at least this fraction of its longest; the rest is padding."""

SHORT_TOKENS = 32
"""Segments up to this length go into one bucket: a call costs more than their padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Segments of about one length, padded to the longest of them.

    Attributes:
        index: ``[n, P]`` int64, the place in the row of each token; padding repeats the last one.
        start: first place, if the bucket is a single segment, which needs no copy; else None.
    """

    index: Tensor
    start: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens of its longest segment."""
        return self.index.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentGeometry:
    """Segments of a flat row; a token sees itself and the tokens before it in its segment.

    Attributes:
        cu_seqlens: ``[S + 1]`` int32, where each segment starts, and ``T``.
        max_segment: tokens of the longest one.
        buckets: the same segments as batches of about equal lengths.
        inverse: ``[T]`` int64, the place of each token in the buckets laid end to end.
    """

    cu_seqlens: Tensor
    max_segment: int
    buckets: tuple[Bucket, ...]
    inverse: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> SegmentGeometry:
        """Return the geometry of segments of these lengths, in this order.

        Raises:
            ValueError: if there is none, or one is empty.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must be at least one of at least one token, got {lengths}")
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        inverse = np.zeros(starts[-1], np.int64)
        buckets = []
        offset = 0
        for members in _buckets(lengths):
            longest = lengths[members[0]]
            within = np.arange(longest)
            sizes = np.array([lengths[i] for i in members])[:, None]
            index = starts[members][:, None] + np.minimum(within, sizes - 1)
            real = within < sizes
            inverse[index[real]] = offset + np.flatnonzero(real)
            offset += index.size
            single = int(index[0, 0]) if len(members) == 1 else None
            buckets.append(Bucket(index=torch.from_numpy(index), start=single))
        return cls(
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            max_segment=max(lengths),
            buckets=tuple(buckets),
            inverse=torch.from_numpy(inverse),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return self.inverse.numel()

    def lengths(self) -> list[int]:
        """Return the tokens of each segment."""
        return self.cu_seqlens.diff().tolist()

    def to(self, device: torch.device | str) -> SegmentGeometry:
        """Return a copy on ``device``."""
        return SegmentGeometry(
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            max_segment=self.max_segment,
            buckets=tuple(
                Bucket(index=b.index.to(device, non_blocking=True), start=b.start)
                for b in self.buckets
            ),
            inverse=self.inverse.to(device, non_blocking=True),
        )


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Return lists of segments of about one length, longest first."""
    buckets: list[list[int]] = []
    least = 0.0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not buckets or length < least:
            buckets.append([])
            least = 0 if length <= SHORT_TOKENS else FILL * length
        buckets[-1].append(index)
    return buckets
