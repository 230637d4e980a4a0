"""Snapshots of the learner's weights: one copy in the training thread, then training goes on."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout, untied

NUM_BUFFERS = 3
"""Snapshots that exist at once at most: one in flight, one waiting, one being written."""


class WeightSource(Protocol):
    """A weight that is computed where it is written to.

    Attributes:
        base: a tensor of its shape and type.
    """

    @property
    def base(self) -> Tensor:
        """A tensor of its shape and type."""
        ...

    def write_to(self, out: Tensor) -> None:
        """Write its present value."""
        ...


class WeightSnapshot:
    """The weights of one policy version in host memory; whoever holds it releases it once.

    Attributes:
        policy_version: of the weights.
        layout: names, types, shapes and places.
        tensors: views by name; valid until :meth:`release`.
        flat: all bytes as uint8 ``[layout.size_bytes]``.
    """

    __slots__ = ("_buffer", "_lock", "_manifest", "_ready", "_release", "layout", "policy_version")

    def __init__(
        self,
        policy_version: int,
        *,
        layout: WeightLayout,
        buffer: FlatBuffer,
        ready: torch.cuda.Event | None,
        release: Callable[[FlatBuffer], None],
    ) -> None:
        self.policy_version = policy_version
        self.layout = layout
        self._buffer = buffer
        self._ready = ready
        self._release: Callable[[FlatBuffer], None] | None = release
        self._manifest: WeightManifest | None = None
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Views by name."""
        return self._buffer.tensors

    @property
    def flat(self) -> Tensor:
        """All bytes, uint8 ``[layout.size_bytes]``."""
        return self._buffer.flat

    def manifest(self) -> WeightManifest:
        """Return the manifest; the first call waits for the copy and computes the checksum.

        The checksum costs about 0.45 s per GB on one core and holds no lock of the interpreter, so
        the publisher calls this, not the training thread.
        """
        with self._lock:
            if self._manifest is None:
                self.wait_for_copy()
                self._manifest = WeightManifest(
                    policy_version=self.policy_version,
                    names=self.layout.names,
                    dtypes=self.layout.dtypes,
                    shapes=self.layout.shapes,
                    checksum=zlib.crc32(self._buffer.data),
                )
            return self._manifest

    def wait_for_copy(self) -> None:
        """Wait until a copy from a GPU is complete."""
        if self._ready is not None:
            self._ready.synchronize()

    def release(self) -> None:
        """Give the buffer back to the pool; later calls do nothing."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release(self._buffer)


class SnapshotPool:
    """A few preallocated host buffers that snapshots are taken into.

    Args:
        named_parameters: the local weights, which optimizers must change in place, or what
            computes them.
        dtype: of the published floating-point tensors; None keeps each parameter's own.
        num_buffers: snapshots that may exist at once; more where versions are held back.

    Raises:
        ValueError: if there is no parameter, a name comes twice, or there is no buffer.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor | WeightSource]],
        *,
        dtype: torch.dtype | None = None,
        num_buffers: int = NUM_BUFFERS,
    ) -> None:
        if num_buffers < 1:
            raise ValueError(f"num_buffers must be >= 1, got {num_buffers}")
        named = list(named_parameters)
        kept = untied((n, w if isinstance(w, Tensor) else w.base) for n, w in named)
        self.layout = WeightLayout.of(kept, dtype=dtype)
        self._computed = {n: w for n, w in named if not isinstance(w, Tensor)}
        self._copied = [(name, tensor) for name, tensor in kept if name not in self._computed]
        self._on_gpu = any(tensor.is_cuda for _, tensor in kept)
        self._num_buffers = num_buffers
        self._free = [FlatBuffer(self.layout, pinned=self._on_gpu) for _ in range(num_buffers)]
        self._lock = threading.Lock()

    def take(self, policy_version: int) -> WeightSnapshot:
        """Copy the weights as they are now; the caller may change them when this returns.

        On a GPU the copy is queued on the current stream, which later changes follow.

        Raises:
            ValueError: if ``policy_version`` is negative.
            RuntimeError: if all buffers are in use.
        """
        if policy_version < 0:
            raise ValueError(f"policy_version must be >= 0, got {policy_version}")
        with self._lock:
            if not self._free:
                raise RuntimeError(
                    f"all {self._num_buffers} snapshots are in use; publish or release each one "
                    "before the next is taken"
                )
            buffer = self._free.pop()
        with torch.no_grad():
            if self._copied:
                torch._foreach_copy_(
                    [buffer.tensors[name] for name, _ in self._copied],
                    [tensor for _, tensor in self._copied],
                    non_blocking=self._on_gpu,
                )
            for name, source in self._computed.items():
                source.write_to(buffer.tensors[name])
        ready = None
        if self._on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        return WeightSnapshot(
            policy_version, layout=self.layout, buffer=buffer, ready=ready, release=self._give_back
        )

    def _give_back(self, buffer: FlatBuffer) -> None:
        with self._lock:
            self._free.append(buffer)
