"""Keeps one engine server alive: starts it, watches it, kills it when it hangs, starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from skyrl_async.rollout.engine_launch import EngineStartError, ServerSettings
from skyrl_async.rollout.engine_process import EngineProcess, RunningServer
from skyrl_async.rollout.guarded_process import ExitReport
from skyrl_async.rollout.hang_watch import HangWatch, Probe

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "healthy", "down"]


class ServerProcess(Protocol):
    """One start of one server, as :class:`skyrl_async.rollout.engine_process.EngineProcess`."""

    async def start(self) -> RunningServer:
        """Return when the server answers, or raise :class:`EngineStartError`."""
        ...

    async def stop(self, *, timeout_s: float) -> ExitReport:
        """End it; return when no process of it is left."""
        ...

    async def wait(self) -> ExitReport:
        """Return when it has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """How patiently a server is stopped and started again.

    Attributes:
        stop_timeout_s: for a server to end by itself when the supervisor is closed.
        first_backoff_s: between a failure and the next start; doubles with every further one.
        max_backoff_s: it does not grow beyond this.
        healthy_period_s: a server that lived this long has the back-off begin anew.
        max_failed_starts: in a row, before the supervisor gives up.

    Raises:
        ValueError: on a value out of range.
    """

    stop_timeout_s: float = 2.0
    first_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    healthy_period_s: float = 60.0
    max_failed_starts: int = 3

    def __post_init__(self) -> None:
        for name in ("healthy_period_s", "max_failed_starts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.stop_timeout_s < 0:
            raise ValueError(f"stop_timeout_s must be >= 0, got {self.stop_timeout_s}")
        if not 0 <= self.first_backoff_s <= self.max_backoff_s:
            raise ValueError(
                "first_backoff_s must be between 0 and max_backoff_s "
                f"{self.max_backoff_s:g}, got {self.first_backoff_s:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """How the server is.

    Attributes:
        state: ``starting``, ``healthy``, or ``down``: ended, being killed, or awaiting a start.
        incarnation: servers that were healthy so far; a new one has lost weights and requests.
        server: None unless healthy.
        detail: why it is not healthy, for the log.
    """

    state: EngineState
    incarnation: int = 0
    server: RunningServer | None = None
    detail: str = ""


def backoff_s(failures: int, *, first_s: float, max_s: float) -> float:
    """Return the seconds to wait after the latest of ``failures`` failures in a row."""
    if failures < 1:
        return 0.0
    # Far beyond any cap, and a float to the power of more would overflow.
    return min(max_s, first_s * 2.0 ** min(failures - 1, 64))


class EngineSupervisor:
    """One server at a time, for as long as ``run()`` runs.

    ::

        start ──answers──► healthy ──ended, or no answer to a probe──► down ──back-off──► start
          └──────────────────────failed start────────────────────────► down

    All calls belong to one event loop. ``close()`` ends ``run()``; no process is left then.

    Args:
        settings: of the server.
        hang_timeout_s: without a sign of life of a scheduler, before its server counts as hung. A
            scheduler answers between two forward passes, so the longest of them must be shorter
            than this by ``probe_interval_s``.
        probe_interval_s: between an answer and the next question.
        limits: of stopping and starting again.
        on_change: called whenever the status has changed.
        make_process: makes one start of a server.
        log_age_s: returns the seconds since the server last wrote something.
        probe: asks a server for a sign of life, with a time limit in seconds; raises OSError or
            TimeoutError if there is none.
        clock: seconds; of life times and of silence.

    Raises:
        ValueError: if a probe would not fit into the time limit.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        hang_timeout_s: float = 4.0,
        probe_interval_s: float = 1.0,
        limits: RestartLimits | None = None,
        on_change: Callable[[], None] = lambda: None,
        make_process: Callable[[ServerSettings], ServerProcess] = EngineProcess,
        probe: Probe | None = None,
        log_age_s: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._hangs = HangWatch(
            hang_timeout_s=hang_timeout_s,
            probe_interval_s=probe_interval_s,
            log_path=settings.log_path,
            probe=probe,
            log_age_s=log_age_s,
            clock=clock,
        )
        self._limits = limits or RestartLimits()
        self._on_change = on_change
        self._make_process = make_process
        self._clock = clock
        self._status = EngineStatus(state="starting")
        self._changed = asyncio.Event()
        self._restart_wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: EngineStartError | None = None
        self._closed = False

    @property
    def status(self) -> EngineStatus:
        """How the server is now."""
        return self._status

    @property
    def state(self) -> EngineState:
        """``starting``, ``healthy`` or ``down``."""
        return self._status.state

    @property
    def server(self) -> RunningServer | None:
        """The healthy server."""
        return self._status.server

    @property
    def incarnation(self) -> int:
        """How many servers were healthy so far, this one included."""
        return self._status.incarnation

    @property
    def detail(self) -> str:
        """Why the server is, or was last, not healthy."""
        return self._status.detail

    async def wait_healthy(self, *, timeout_s: float) -> RunningServer:
        """Return the server as soon as it is healthy.

        Raises:
            RuntimeError: if it is not in time, or the supervisor gave up or was closed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._status.server is None and self._failure is None and not self._closed:
                    await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        if self._status.server is None:
            raise RuntimeError(
                f"no healthy SGLang server within {timeout_s:g} s: {self._status.state}; "
                f"log: {self._settings.log_path}; {self._status.detail}"
            )
        return self._status.server

    async def wait_change(self, seen: EngineStatus, *, timeout_s: float) -> EngineStatus:
        """Return the status as soon as it differs from ``seen``, at the latest after a time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._status == seen:
                    await self._changed.wait()
        return self._status

    @contextlib.contextmanager
    def expect_silence(self, timeout_s: float) -> Iterator[None]:
        """Do not take a blocked scheduler for a hang, for at most ``timeout_s`` seconds.

        For loads of weights, which keep the scheduler from answering. The end of a process is
        noticed all the same.
        """
        with self._hangs.expect_silence(timeout_s):
            yield

    def restart(self, reason: str) -> None:
        """Take a healthy server down at once, to be killed and started again.

        Args:
            reason: for the status and the log.
        """
        if self._status.state == "healthy":
            self._set(state="down", detail=reason)
            self._restart_wanted.set()

    async def run(self) -> None:
        """Keep a server alive until :meth:`close`.

        Raises:
            EngineStartError: if it failed to start too often in a row.
            RuntimeError: if it runs already, or ran before.
        """
        if self._task is not None:
            raise RuntimeError("run() was called before; make a new EngineSupervisor")
        if self._closed:
            return
        self._task = asyncio.create_task(self._supervise())
        try:
            await asyncio.wait({self._task})
        finally:
            await self.close()
        if not self._task.cancelled():
            self._task.result()

    async def close(self) -> None:
        """End the server and :meth:`run`; return when no process is left."""
        self._closed = True
        self._wake()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _supervise(self) -> None:
        failed_starts = short_lives = 0
        while True:
            self._set(state="starting", detail=self._status.detail)
            engine = self._make_process(self._settings)
            try:
                server = await engine.start()
            except EngineStartError as error:
                failed_starts += 1
                self._set(state="down", detail=str(error))
                if failed_starts >= self._limits.max_failed_starts:
                    self._failure = EngineStartError(
                        f"gave up after {failed_starts} failed starts in a row: {error}"
                    )
                    self._wake()
                    raise self._failure from error
            else:
                failed_starts = 0
                if await self._live(engine, server) >= self._limits.healthy_period_s:
                    short_lives = 0
            short_lives += 1
            logger.warning("engine is down: %s", self._status.detail)
            limits = self._limits
            await asyncio.sleep(
                backoff_s(short_lives, first_s=limits.first_backoff_s, max_s=limits.max_backoff_s)
            )

    async def _live(self, engine: ServerProcess, server: RunningServer) -> float:
        """Watch a healthy server to its end; return the seconds that it was healthy."""
        since_s = self._clock()
        self._restart_wanted.clear()
        self._set(state="healthy", incarnation=self._status.incarnation + 1, server=server)
        stop_timeout_s = self._limits.stop_timeout_s
        detail = "the supervisor was closed"
        try:
            detail = await self._watch(engine, server)
            stop_timeout_s = 0.0
        finally:
            lived_s = self._clock() - since_s
            self._set(state="down", detail=detail)
            try:
                await engine.stop(timeout_s=stop_timeout_s)
            except TimeoutError:
                logger.error("processes of engine %s cannot be killed", server.url)
        return lived_s

    async def _watch(self, engine: ServerProcess, server: RunningServer) -> str:
        """Return why the server is not healthy any more."""
        ended = asyncio.create_task(engine.wait())
        unwanted = asyncio.create_task(self._restart_wanted.wait())
        try:
            quiet_s = await self._hangs.wait_hung(server, over={ended, unwanted})
            if unwanted.done():
                return self._status.detail
            if ended.done():
                report = ended.result()
                first = f"the server ended with return code {report.returncode}"
                return "\n  ".join((first, *report.last_lines))
            return f"the server hung: no answer to a probe for {quiet_s:.1f} s"
        finally:
            ended.cancel()
            unwanted.cancel()

    def _set(
        self,
        *,
        state: EngineState,
        incarnation: int | None = None,
        server: RunningServer | None = None,
        detail: str = "",
    ) -> None:
        if incarnation is None:
            incarnation = self._status.incarnation
        self._status = EngineStatus(
            state=state, incarnation=incarnation, server=server, detail=detail
        )
        self._wake()
        self._on_change()

    def _wake(self) -> None:
        # Whoever waits now is woken; whoever comes later waits for the next change.
        self._changed.set()
        self._changed = asyncio.Event()
