"""Sessions of synchronous environments in a few killable processes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.outcomes import StepOutcome
from skyrl_async.environments.worker_process import (
    EXIT_TIMEOUT_S,
    STUCK_AFTER_S,
    WorkerBusy,
    WorkerDied,
    WorkerHung,
    WorkerLost,
    WorkerProcess,
    WorkerStartFailed,
)
from skyrl_async.types import DropReason, Task

logger = logging.getLogger(__name__)

MAX_MOVES = 64
"""An episode that loses its process more often than this fails; it leaves a stuck one only while it
has moved less than half as often."""


class WorkerPool:
    """Starts the processes, replaces those that end, and says which one plays a new session.

    Args:
        hello: first message to each, see :mod:`skyrl_async.environments.worker`.
        num_processes: live at once; up to twice as many when all of them are stuck.
        step_timeout_s: of each call.
        startup_timeout_s: of each process.
    """

    def __init__(
        self,
        hello: Mapping[str, Any],
        *,
        num_processes: int,
        step_timeout_s: float,
        startup_timeout_s: float,
    ) -> None:
        self._hello = hello
        self._num_processes = num_processes
        self._startup_timeout_s = startup_timeout_s
        self._workers: list[WorkerProcess] = []
        self._burying: set[asyncio.Task[None]] = set()
        self._num_sessions = 0
        self.step_timeout_s = step_timeout_s
        self.closed = False

    def new_session_id(self) -> int:
        """Return a number that no other session has."""
        self._num_sessions += 1
        return self._num_sessions

    def start(self) -> None:
        """Start processes until there are ``num_processes``; does not wait for them.

        Raises:
            EnvironmentFailure: if a process cannot be started.
        """
        self._workers = [worker for worker in self._workers if worker.alive]
        while len(self._workers) < self._num_processes:
            self._start_one()

    def pick(self) -> WorkerProcess:
        """Return the process that can be expected to answer a new session first.

        Raises:
            EnvironmentFailure: if the pool is closed or a process cannot be started.
        """
        if self.closed:
            raise EnvironmentFailure(DropReason.SHUTDOWN, "the environments are being closed")
        self.start()
        if self._can_grow() and all(worker.stuck for worker in self._workers):
            self._start_one()
        return min(
            self._workers,
            key=lambda w: (w.stuck, not w.ready, w.num_waiting, w.num_sessions),
        )

    def _start_one(self) -> None:
        try:
            worker = WorkerProcess(
                self._hello,
                startup_timeout_s=self._startup_timeout_s,
                has_room_elsewhere=self._has_room,
                burying=self._burying,
            )
        except OSError as error:
            raise EnvironmentFailure(
                DropReason.ENVIRONMENT_ERROR, f"no process can be started: {error}"
            ) from error
        self._workers.append(worker)

    def _can_grow(self) -> bool:
        return len(self._workers) < 2 * self._num_processes

    def _has_room(self) -> bool:
        return self._can_grow() or not all(w.stuck for w in self._workers if w.alive)

    async def close(self, *, timeout_s: float) -> None:
        """Let calls finish and environments close for a while, then kill; no process remains."""
        self.closed = True
        exits = []
        for worker in self._workers:
            if worker.alive:
                exits.append(worker.call(["exit"], timeout_s=timeout_s))
        if exits:
            await asyncio.wait(exits, timeout=timeout_s)
        for worker in self._workers:
            worker.kill("was closed")
        if self._burying:
            await asyncio.wait(set(self._burying), timeout=2 * EXIT_TIMEOUT_S)


class WorkerSession:
    """One episode in a process that it shares with others.

    It stays in one process as long as it can. When that is lost to another episode, or has been
    busy with another's call for longer than all calls of this one took, the environment is made
    again in another process, where the recorded calls are repeated; each must be answered as
    before. So an episode never spends more time on moving than it would have spent waiting.

    Args:
        pool: gives processes.
        task: what is played; ``extras`` must be JSON.
    """

    def __init__(self, pool: WorkerPool, task: Task) -> None:
        self._pool = pool
        self._task = task
        self._session_id = pool.new_session_id()
        self._worker: WorkerProcess | None = None
        self._history: list[tuple[list[Any], int]] = []  # call, hash of its answer
        self._played_s = 0.0
        self._num_moves = 0
        self._was_reset = False
        self._closed = False

    async def reset(self) -> str:
        """Make the environment and return its first observation.

        Raises:
            EnvironmentFailure: if it fails, misses the deadline, or the extras are not JSON.
            RuntimeError: if this was called before.
        """
        if self._was_reset:
            raise RuntimeError("a session plays one episode; open another")
        self._was_reset = True
        extras = dict(self._task.extras)
        return await self._call(["reset", self._session_id, self._task.seed, extras])

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply.

        Raises:
            EnvironmentFailure: if the environment fails, misses the deadline, or cannot be made
                again after its process was lost.
            RuntimeError: before :meth:`reset` or after :meth:`close`.
        """
        if not self._was_reset or self._closed:
            raise RuntimeError("the session is not open: call reset first")
        return StepOutcome(*await self._call(["step", self._session_id, reply]))

    async def close(self) -> None:
        """Let the environment be closed when its process comes to it; a failure is logged."""
        self._closed = True
        self._leave()

    def _leave(self) -> None:
        """Have the environment closed where it is."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.num_sessions -= 1
        if worker.alive:
            message = ["close", self._session_id]
            closing = worker.call(message, timeout_s=self._pool.step_timeout_s)
            closing.add_done_callback(self._closing_done)

    def _closing_done(self, closing: asyncio.Future[Any]) -> None:
        if closing.cancelled():
            return
        error = closing.exception()
        if isinstance(error, WorkerHung | WorkerDied):
            logger.warning("%s: its process ended in close: %s", self._task.task_id, error)
        elif error is None and closing.result() is not None:
            logger.warning("%s: %s", self._task.task_id, closing.result()["detail"])

    async def _call(self, message: list[Any]) -> Any:
        """Have ``message`` answered, by another process if need be."""
        clock = asyncio.get_running_loop().time
        while True:
            began_s = clock()
            try:
                if self._worker is None or not self._worker.alive:
                    await self._enter()
                    began_s = clock()
                answer = await self._ask(message)
            except WorkerBusy:
                self._leave()
            except WorkerStartFailed as error:
                raise self._failure(f"its process {error}") from None
            except WorkerLost as error:
                if self._num_moves > MAX_MOVES:
                    raise self._failure(
                        f"its process {error}, and so did {MAX_MOVES} before it"
                    ) from None
            else:
                self._history.append((message, _fingerprint(answer)))
                self._played_s += clock() - began_s
                return answer

    async def _enter(self) -> None:
        """Take a process, and bring the environment to where it was."""
        self._leave()
        self._worker = self._pool.pick()
        self._worker.num_sessions += 1
        self._num_moves += 1
        for index, (message, fingerprint) in enumerate(self._history):
            answer = await self._ask(message)
            if _fingerprint(answer) != fingerprint:
                raise self._failure(
                    "it had to move to another process because of another episode, but when it was "
                    f"played again with the same seed, call {index} was answered differently"
                )

    async def _ask(self, message: list[Any]) -> Any:
        assert self._worker is not None
        may_leave = 2 * self._num_moves < MAX_MOVES
        try:
            answer = await self._worker.call(
                message,
                timeout_s=self._pool.step_timeout_s,
                patience_s=max(STUCK_AFTER_S, self._played_s) if may_leave else math.inf,
            )
        except WorkerHung:
            raise EnvironmentFailure(
                DropReason.STEP_TIMEOUT,
                f"{self._task.task_id}: {message[0]} took longer than "
                f"{self._pool.step_timeout_s} s; its process was killed",
            ) from None
        except WorkerDied as error:
            raise self._failure(f"its process {error} during {message[0]}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise self._failure(f"its extras are not JSON: {error}") from None
        if isinstance(answer, dict):
            raise EnvironmentFailure(
                DropReason(answer["reason"]), f"{self._task.task_id}: {answer['detail']}"
            )
        return answer

    def _failure(self, detail: str) -> EnvironmentFailure:
        return EnvironmentFailure(DropReason.ENVIRONMENT_ERROR, f"{self._task.task_id}: {detail}")


def _fingerprint(answer: Any) -> int:
    return hash(answer if isinstance(answer, str) else tuple(answer))
