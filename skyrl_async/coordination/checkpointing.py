"""When checkpoints are written, and that no step is counted before the one due is whole.

A step that ends while a checkpoint is being written is recorded only when that is whole. So a run
that is killed at any moment goes on at most ``every_steps`` steps before the last one recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from skyrl_async.coordination.deadlines import Deadline
from skyrl_async.coordination.errors import blaming
from skyrl_async.coordination.run_state import RunState


class CheckpointStore(Protocol):
    """Writes checkpoints, one after the other."""

    async def begin(self, state: RunState) -> None:
        """Copy what is to be written; training may go on when this returns."""
        ...

    async def finish(self) -> None:
        """Return when the one that was begun is whole."""
        ...


class Checkpointing:
    """Begins a checkpoint every few steps, and waits for it before the next step is counted.

    ::

        checkpoints.join()                     # before a step is recorded
        checkpoints.after_step(step, state)    # when it is

    Args:
        store: writes them; without one nothing is written.
        every_steps: between two.
        timeout_s: one that takes longer has failed.
        last_step: at which there is one already.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        *,
        every_steps: int,
        timeout_s: float,
        last_step: int = 0,
    ) -> None:
        self._store = store
        self._every_steps = every_steps
        self._timeout_s = timeout_s
        self._last_step = last_step
        self._writing: asyncio.Task[None] | None = None

    @property
    def enabled(self) -> bool:
        """Whether checkpoints are written at all."""
        return self._store is not None

    async def after_step(self, step: int, state: Callable[[], RunState]) -> None:
        """Begin a checkpoint if one is due after ``step``.

        Raises:
            WorkerFailed: if that fails.
        """
        if self._store is not None and step % self._every_steps == 0:
            await self.write(step, state)

    async def write(self, step: int, state: Callable[[], RunState]) -> None:
        """Begin a checkpoint, unless there is one of this step.

        Raises:
            WorkerFailed: if that fails.
        """
        if self._store is None or step == self._last_step:
            return
        await self.join()
        self._last_step = step
        with blaming("checkpoint"):
            async with Deadline(self._timeout_s, f"the state of step {step} to be copied"):
                await self._store.begin(state())
        self._writing = asyncio.create_task(self._finish(self._store, step))

    async def join(self) -> None:
        """Wait until the checkpoint that was begun is whole.

        Raises:
            WorkerFailed: if it could not be written.
        """
        if self._writing is not None:
            await self._writing
            self._writing = None

    async def cancel(self) -> None:
        """Stop waiting; what is written so far stays hidden."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _finish(self, store: CheckpointStore, step: int) -> None:
        with blaming("checkpoint"):
            async with Deadline(self._timeout_s, f"step {step} to be written"):
                await store.finish()
