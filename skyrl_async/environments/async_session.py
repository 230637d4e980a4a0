"""Sessions of asynchronous environments, on the event loop of the actor."""

from __future__ import annotations

import asyncio
import functools
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.outcomes import (
    StepOutcome,
    checked_reset,
    checked_step,
    described_error,
    failure_of,
)
from skyrl_async.types import DropReason, Task

logger = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0
"""Seconds that a coroutine gets to end after it was cancelled, before it is abandoned."""

_STOPS_TO_END = 4
"""A call and close() may each swallow one cancellation; the next one ends them."""

_Due = tuple[float, str, "asyncio.Future[Any]"]
"""Deadline on the loop's clock, what is done, and its answer."""

_Call = tuple[str, Callable[[], Coroutine[Any, Any, Any]], "asyncio.Future[Any]"]


class AsyncSession:
    """Runs all calls of one environment in one task, each within a deadline.

    One task, because what an environment enters in ``reset`` (a cancel scope, a context variable)
    it must be able to leave in ``close``. The task closes the environment however it ends.

    Args:
        make: makes the environment.
        task: what it plays.
        step_timeout_s: of each call; a call that misses it is cancelled.
        max_observation_chars: a longer observation fails the episode.
        running: holds the session while its task runs; the owner ends what is left
            (:func:`end_all`).
    """

    def __init__(
        self,
        make: Callable[[], Any],
        task: Task,
        *,
        step_timeout_s: float,
        max_observation_chars: int,
        running: set[AsyncSession],
    ) -> None:
        self._make = make
        self._task = task
        self._timeout_s = step_timeout_s
        self._max_observation_chars = max_observation_chars
        self._running = running
        self._environment: Any = None
        self._calls: asyncio.Queue[_Call | None] = asyncio.Queue()
        self._num_stops = 0
        self._closed = False
        self._ending: asyncio.TimerHandle | None = None
        self._answer_due: _Due | None = None
        self._watching: asyncio.TimerHandle | None = None
        self.server: asyncio.Task[None] | None = None

    async def reset(self) -> str:
        """Make the environment and return its first observation.

        Raises:
            EnvironmentFailure: if it fails or misses the deadline.
            RuntimeError: if this was called before.
        """
        if self.server is not None:
            raise RuntimeError("a session plays one episode; open another")
        self.server = asyncio.create_task(self._serve())
        self._running.add(self)
        self.server.add_done_callback(self._ended)
        value = await self._call("reset", self._make_and_reset)
        return self._checked(checked_reset, value, doing="reset")

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply.

        Raises:
            EnvironmentFailure: if the environment fails or misses the deadline.
            RuntimeError: before :meth:`reset` or after :meth:`close`.
        """
        value = await self._call("step", lambda: self._environment.step(reply))
        return self._checked(checked_step, value, doing="step")

    async def close(self) -> None:
        """Let the environment be closed in the background, within the deadline."""
        if not self._closed:
            self.end_within(self._timeout_s)

    def end_within(self, timeout_s: float) -> None:
        """Let the current call finish and the environment close, then stop what still runs."""
        self._closed = True
        if self.server is None or self.server.done():
            return
        self._calls.put_nowait(None)
        if self._ending is not None:
            self._ending.cancel()
        self._stop_after(timeout_s, _STOPS_TO_END)

    def _stop_after(self, seconds: float, times: int) -> None:
        """Stop after a while, and again after each grace; one timer, for most never fire."""
        later = asyncio.get_running_loop().call_later
        self._ending = later(seconds, self._stop_and_again, times)

    def _stop_and_again(self, times: int) -> None:
        self.stop()
        if times > 1:
            self._stop_after(CANCEL_GRACE_S, times - 1)

    def stop(self) -> None:
        """Cancel what runs; a coroutine that swallowed this once is abandoned the next time."""
        self._num_stops += 1
        if self.server is not None:
            self.server.cancel()

    def _ended(self, server: asyncio.Task[None]) -> None:
        self._running.discard(self)
        for timer in (self._ending, self._watching):
            if timer is not None:
                timer.cancel()

    async def _make_and_reset(self) -> Any:
        self._environment = self._make()
        return await self._environment.reset(seed=self._task.seed, options=dict(self._task.extras))

    async def _call(self, doing: str, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self.server is None or self._closed:
            raise RuntimeError("the session is not open: call reset first")
        if self._num_stops or self.server.done():
            raise RuntimeError("the session has failed: close it")
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._calls.put_nowait((doing, function, answer))
        self._answer_due = (loop.time() + self._timeout_s, doing, answer)
        if self._watching is None:
            self._watching = loop.call_at(self._answer_due[0], self._watch)
        try:
            return await answer
        except asyncio.CancelledError:
            self.stop()
            raise
        finally:
            self._answer_due = None

    def _watch(self) -> None:
        """Fail the call that has missed its deadline; come back at the deadline of a later one.

        One timer for all calls of a session: a timer for each would be pushed and cancelled many
        times for every one that fires.
        """
        self._watching = None
        if self._answer_due is None:
            return
        due_s, doing, answer = self._answer_due
        loop = asyncio.get_running_loop()
        if loop.time() < due_s:
            self._watching = loop.call_at(due_s, self._watch)
        elif not answer.done():
            self.stop()
            text = f"{self._task.task_id}: {doing} took longer than {self._timeout_s} s"
            answer.set_exception(EnvironmentFailure(DropReason.STEP_TIMEOUT, text))

    def _checked(self, check: Callable[..., Any], value: Any, *, doing: str) -> Any:
        try:
            return check(value, max_observation_chars=self._max_observation_chars)
        except EnvironmentFailure as error:
            raise failure_of(error, doing=doing, task_id=self._task.task_id) from None

    async def _serve(self) -> None:
        try:
            while (call := await self._calls.get()) is not None:
                await self._answer(*call)
        finally:
            await self._close_environment()

    async def _answer(
        self,
        doing: str,
        function: Callable[[], Coroutine[Any, Any, Any]],
        answer: asyncio.Future[Any],
    ) -> None:
        try:
            value = await self._until_stopped_twice(function())
        except BaseException as error:
            if not answer.done():
                answer.set_exception(failure_of(error, doing=doing, task_id=self._task.task_id))
            if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                raise
        else:
            if not answer.done():
                answer.set_result(value)

    async def _close_environment(self) -> None:
        close = getattr(self._environment, "close", None)
        if close is None:
            return
        try:
            closing = close()
            if asyncio.iscoroutine(closing):
                await self._until_stopped_twice(closing)
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:
            logger.warning("%s: %s", self._task.task_id, described_error(error, doing="close"))

    @types.coroutine
    def _until_stopped_twice(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Await ``coroutine``; :meth:`stop` cancels it once, and the second time leaves it behind.

        So nothing outlasts its task by swallowing ``CancelledError``, as it could under a plain
        ``await``, where every cancellation is the coroutine's to swallow. Cancellations that the
        coroutine brings on itself, as ``asyncio.timeout`` does, all reach it.
        """
        last_stop = self._num_stops + 1
        resume: Callable[[], Any] = functools.partial(coroutine.send, None)
        while True:
            try:
                awaited = resume()
            except StopIteration as stop:
                return stop.value
            try:
                yield awaited
                resume = functools.partial(coroutine.send, None)
            except asyncio.CancelledError as error:
                if self._num_stops > last_stop:
                    _abandon(coroutine)
                    raise
                resume = functools.partial(coroutine.throw, error)
            except BaseException as error:
                resume = functools.partial(coroutine.throw, error)


async def end_all(running: set[AsyncSession], *, timeout_s: float) -> None:
    """Close sessions, stop those that have not ended after ``timeout_s``, and wait for all.

    Args:
        running: each session leaves the set when it ends.
        timeout_s: before the first is stopped.
    """
    servers = {session.server for session in running if session.server is not None}
    for session in running:
        session.end_within(timeout_s)
    if servers:
        await asyncio.wait(servers, timeout=timeout_s + (_STOPS_TO_END + 1) * CANCEL_GRACE_S)


def _abandon(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Give ``finally`` blocks their chance; a coroutine that still goes on is dropped."""
    try:
        coroutine.close()
    except BaseException as error:
        logger.warning("an abandoned environment: %s", described_error(error, doing="closing it"))
