"""Sessions of synchronous environments in a few killable processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.outcomes import StepOutcome
from skyrl_async.environments.worker_process import (
    EXIT_TIMEOUT_S,
    WorkerDied,
    WorkerHung,
    WorkerLost,
    WorkerProcess,
    WorkerStartFailed,
)
from skyrl_async.types import DropReason, Task

logger = logging.getLogger(__name__)

MAX_MOVES = 3
"""An episode that loses its process more often than this fails."""


class WorkerPool:
    """Starts the processes, replaces those that end, and says which one plays a new session.

    Args:
        hello: first message to each, see :mod:`skyrl_async.environments.worker`.
        num_processes: live at once.
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
            try:
                worker = WorkerProcess(
                    self._hello,
                    startup_timeout_s=self._startup_timeout_s,
                    burying=self._burying,
                )
            except OSError as error:
                raise EnvironmentFailure(
                    DropReason.ENVIRONMENT_ERROR, f"no process can be started: {error}"
                ) from error
            self._workers.append(worker)

    def pick(self) -> WorkerProcess:
        """Return the process with the fewest calls waiting, then the fewest sessions.

        Raises:
            EnvironmentFailure: if the pool is closed or a process cannot be started.
        """
        if self.closed:
            raise EnvironmentFailure(DropReason.SHUTDOWN, "the environments are being closed")
        self.start()
        return min(self._workers, key=lambda worker: (worker.num_waiting, worker.num_sessions))

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

    It stays in one process. When that is lost to another episode, the next call makes the
    environment again in another process and repeats the recorded calls there; each must be answered
    as before.

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
        self._closed = False

    async def reset(self) -> str:
        """Make the environment and return its first observation.

        Raises:
            EnvironmentFailure: if it fails, misses the deadline, or the extras are not JSON.
            RuntimeError: if this was called before.
        """
        if self._worker is not None:
            raise RuntimeError("a session plays one episode; open another")
        extras = dict(self._task.extras)
        return await self._call(["reset", self._session_id, self._task.seed, extras])

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply.

        Raises:
            EnvironmentFailure: if the environment fails, misses the deadline, or cannot be made
                again after its process was lost.
            RuntimeError: before :meth:`reset` or after :meth:`close`.
        """
        if self._worker is None or self._closed:
            raise RuntimeError("the session is not open: call reset first")
        return StepOutcome(*await self._call(["step", self._session_id, reply]))

    async def close(self) -> None:
        """Let the environment be closed when its process comes to it; a failure is logged."""
        worker = self._worker
        if worker is None or self._closed:
            return
        self._closed = True
        worker.num_sessions -= 1
        if worker.alive:
            closing = worker.call(["close", self._session_id], timeout_s=self._pool.step_timeout_s)
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
        """Have ``message`` answered, by another process if this one is lost."""
        why = ""
        for _ in range(1 + MAX_MOVES):
            try:
                if self._worker is None or not self._worker.alive:
                    await self._move()
                answer = await self._ask(message)
            except WorkerStartFailed as error:
                raise self._failure(f"its process {error}") from None
            except WorkerLost as error:
                why = str(error)
                continue
            self._history.append((message, _fingerprint(answer)))
            return answer
        raise self._failure(f"its process {why}, and so did {MAX_MOVES} others before")

    async def _move(self) -> None:
        """Take another process, and bring the environment to where it was."""
        if self._worker is not None:
            self._worker.num_sessions -= 1
        self._worker = self._pool.pick()
        self._worker.num_sessions += 1
        for index, (message, fingerprint) in enumerate(self._history):
            answer = await self._ask(message)
            if _fingerprint(answer) != fingerprint:
                raise self._failure(
                    "its process ended because of another episode, and when it was played again "
                    f"with the same seed, call {index} was answered differently"
                )

    async def _ask(self, message: list[Any]) -> Any:
        assert self._worker is not None
        try:
            answer = await self._worker.call(message, timeout_s=self._pool.step_timeout_s)
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
