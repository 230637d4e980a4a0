"""The two buffers beside an engine: one that its live parameters may alias, one to write into."""

from __future__ import annotations

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.transport import verify


class WeightStaging:
    """Double buffering for an engine that exchanges pointers at a swap.

    Args:
        expected: layout of the engine's parameters.
        policy_version: that the engine runs now; -1 if its weights count for nothing.
        shared: stage into named shared memory, which the engine copies from; so one buffer is
            enough.
        pinned: stage into page-locked memory, which an engine on a GPU copies from; the same.
    """

    def __init__(
        self,
        expected: WeightLayout,
        *,
        policy_version: int = -1,
        shared: bool = False,
        pinned: bool = False,
    ) -> None:
        self.expected = expected
        self._shared = shared
        self._pinned = pinned
        self.policy_version = policy_version
        self._buffers: list[FlatBuffer | None] = [None, None]
        self._free = 0

    def admit(self, manifest: WeightManifest, *, checksum: int | None = None) -> None:
        """Check a version as :func:`verify` does.

        Raises:
            TransferRejected: naming the first difference.
        """
        verify(manifest, self.expected, current_version=self.policy_version, checksum=checksum)

    def free_buffer(self) -> FlatBuffer:
        """Return the buffer that no live parameter aliases."""
        buffer = self._buffers[self._free]
        if buffer is None:
            buffer = FlatBuffer(self.expected, shared=self._shared, pinned=self._pinned)
            self._buffers[self._free] = buffer
        return buffer

    def commit(self, policy_version: int) -> None:
        """Say that the engine now runs ``policy_version`` from the free buffer."""
        self.policy_version = policy_version
        if not (self._shared or self._pinned):
            self._free = 1 - self._free
