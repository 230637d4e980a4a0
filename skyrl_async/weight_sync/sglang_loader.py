"""From the staging buffer beside an SGLang server into the server: the only part that stops it.

====================  ==================================  ====================================
``kv_after_swap``     running requests                    new requests
====================  ==================================  ====================================
``recompute``         retracted; their whole context is   start from an empty prefix cache
                      computed again by the new weights
``keep``              go on with the KV of the old        must carry a cache namespace of their
                      weights                             own, or they reuse KV of old weights
====================  ==================================  ====================================

A cache is never flushed under requests that keep their KV: that ends the server.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl

LoadWay = Literal["memory", "file"]
KvAfterSwap = Literal["recompute", "keep"]

_SHARED_MEMORY = Path("/dev/shm")
_LEAST_S = 1.0
"""For the calls that put things right after a failure."""


class EngineBroken(RuntimeError):
    """A load failed half way: the server's weights are of no version, and it must start anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One version that a server has loaded.

    Attributes:
        policy_version: that it runs now.
        prepare_s: seconds of preparing while the server went on generating.
        stall_s: seconds in which the server did not generate.
    """

    policy_version: int
    prepare_s: float
    stall_s: float


class SglangLoader:
    """Loads verified tensors into one server.

    Args:
        control: of the server.
        kv_after_swap: what happens to running requests.
        way: ``memory`` hands over shared memory; ``file`` writes safetensors to a memory file
            system while the server generates, and has it read from there.
        tensor_parallel: ranks of the server; each is given all tensors.
        scratch: folder of a memory file system, for ``file``.
    """

    def __init__(
        self,
        control: SglangControl,
        *,
        kv_after_swap: KvAfterSwap,
        way: LoadWay,
        tensor_parallel: int = 1,
        scratch: Path = _SHARED_MEMORY,
    ) -> None:
        self._control = control
        self._recompute = kv_after_swap == "recompute"
        self._way = way
        self._tensor_parallel = tensor_parallel
        self._scratch = scratch

    async def load(
        self, weights: Mapping[str, Tensor], *, policy_version: int, timeout_s: float
    ) -> LoadReport:
        """Make the server run ``weights``; returns when it generates again.

        Args:
            weights: complete and verified, by Hugging Face name, in shared memory for ``memory``.
            policy_version: of them.
            timeout_s: for everything.

        Raises:
            EngineBroken: if the server is left without whole weights, or paused.
            ControlError: if it refused before anything changed.
        """
        started = time.monotonic()
        deadline = started + timeout_s
        if self._way == "file":
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="weights-") as name:
                save_file(dict(weights), Path(name) / "model.safetensors", {"format": "pt"})
                prepared = time.monotonic()
                async with self.stopped(deadline):
                    await self._control.update_from_disk(
                        name,
                        policy_version=policy_version,
                        flush_cache=self._recompute,
                        timeout_s=deadline - time.monotonic(),
                    )
        else:
            payload = shared_payload(weights)
            prepared = time.monotonic()
            async with self.stopped(deadline), self.session(deadline):
                await self._control.update_from_tensors(
                    [payload] * self._tensor_parallel,
                    policy_version=policy_version,
                    flush_cache=self._recompute,
                    timeout_s=deadline - time.monotonic(),
                )
        return LoadReport(
            policy_version=policy_version,
            prepare_s=prepared - started,
            stall_s=time.monotonic() - prepared,
        )

    @contextlib.asynccontextmanager
    async def stopped(self, deadline: float) -> AsyncIterator[None]:
        """Pause the server for the time inside; it always goes on, or is reported as broken.

        Args:
            deadline: ``time.monotonic()`` at which everything must be done.

        Raises:
            EngineBroken: if the inside failed, or the server may have stayed paused.
            ControlError: if the server refused to pause.
        """
        mode: Literal["retract", "in_place"] = "retract" if self._recompute else "in_place"
        try:
            await self._control.pause(mode, timeout_s=deadline - time.monotonic())
        except ControlError as error:
            if error.status is None:
                # Nobody knows whether it paused, or will as soon as it can.
                await self._go_on(deadline)
            raise
        except asyncio.CancelledError:
            await self._go_on(deadline)
            raise
        try:
            yield
        except ControlError as error:
            raise EngineBroken(f"a weight load failed half way: {error}") from error
        finally:
            await self._go_on(deadline)

    @contextlib.asynccontextmanager
    async def session(self, deadline: float) -> AsyncIterator[None]:
        """Open an update inside a pause, and close it, also after a failure.

        Left open, it would make the server refuse every later update. One that somebody else left
        open, such as a worker that was killed, is closed first.
        """
        try:
            await self._control.begin(timeout_s=deadline - time.monotonic())
        except ControlError as error:
            if error.status is None:
                raise
            await self._control.end(timeout_s=deadline - time.monotonic())
            await self._control.begin(timeout_s=deadline - time.monotonic())
        try:
            yield
        except BaseException:
            with contextlib.suppress(ControlError):
                await self._control.end(timeout_s=_after(deadline))
            raise
        await self._control.end(timeout_s=deadline - time.monotonic())

    async def _go_on(self, deadline: float) -> None:
        """Resume, also past the deadline: a server that stays paused is worse than a late one."""
        try:
            await self._control.resume(timeout_s=_after(deadline))
        except ControlError as error:
            raise EngineBroken(f"the server does not go on: {error}") from error

    @property
    def recompute(self) -> bool:
        """Whether running requests are computed again."""
        return self._recompute


def _after(deadline: float) -> float:
    return max(_LEAST_S, deadline - time.monotonic())


def shared_payload(weights: Mapping[str, Tensor]) -> str:
    """Return base64 of the pickled ``[(name, tensor)]``, which refers to shared memory.

    Raises:
        ValueError: if a tensor on the CPU is not in shared memory: its pickle would carry a file
            descriptor that no other process can open.
    """
    for name, tensor in weights.items():
        if not tensor.is_cuda and not tensor.is_shared():
            raise ValueError(f"{name!r} is not in shared memory; stage into a shared buffer")
    # The default strategy hands over file descriptors, which only children can receive.
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(list(weights.items()))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()
