"""A supervisor over fake server processes, with a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from skyrl_async.rollout.engine_launch import EngineStartError
from skyrl_async.rollout.engine_process import ExitReport, RunningServer
from skyrl_async.rollout.engine_supervisor import EngineSupervisor, RestartLimits
from tests.fakes import FakeClock
from tests.rollout.server_processes import (
    fake_settings,
    run_async,
)

SOON_S = 10.0


QUICK = RestartLimits(first_backoff_s=0.0, max_backoff_s=0.0, stop_timeout_s=0.5)


class FakeServerProcess:
    """One start of a server that lives until ``die`` or ``stop``."""

    def __init__(self, number: int, *, fails: bool = False) -> None:
        self.number = number
        self.stops: list[float] = []
        self._fails = fails
        self._ended: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()
        self._started = False

    async def start(self) -> RunningServer:
        assert not self._started
        self._started = True
        await asyncio.sleep(0)
        if self._fails:
            raise EngineStartError(f"start {self.number} failed", last_lines=("no room",))
        url = f"http://127.0.0.1:{self.number}"
        return RunningServer(
            url=url, api_key="a", admin_key="b", pid=self.number, sglang_version="0.5.21"
        )

    def die(self, *lines: str) -> None:
        self._ended.set_result(ExitReport(returncode=-9, last_lines=lines))

    async def stop(self, *, timeout_s: float) -> ExitReport:
        assert self._started and timeout_s >= 0
        self.stops.append(timeout_s)
        if not self._ended.done():
            self._ended.set_result(ExitReport(returncode=0))
        return await self.wait()

    async def wait(self) -> ExitReport:
        return await asyncio.shield(self._ended)


class World:
    """A supervisor over fake servers, what they answer, and all that it reported."""

    def __init__(self, folder: Path, *, fails: Callable[[int], bool] = lambda n: False, **options):
        self.clock = FakeClock()
        self.started: list[FakeServerProcess] = []
        self.states: list[tuple[str, int]] = []
        self.answer: Callable[[], Exception | None] = lambda: None
        self.probes: list[float] = []
        self._fails = fails
        self.supervisor = EngineSupervisor(
            fake_settings(folder, python=folder),
            probe_interval_s=0.005,
            on_change=self._note,
            make_process=self._make,
            probe=self._probe,
            clock=self.clock,
            **({"limits": QUICK} | options),
        )

    def _make(self, settings) -> FakeServerProcess:
        number = len(self.started) + 1
        self.started.append(FakeServerProcess(number, fails=self._fails(number)))
        return self.started[-1]

    def _note(self) -> None:
        status = self.supervisor.status
        assert (status.server is not None) == (status.state == "healthy")
        self.states.append((status.state, status.incarnation))

    async def _probe(self, server: RunningServer, timeout_s: float) -> None:
        assert server == self.supervisor.server and timeout_s > 0
        self.probes.append(timeout_s)
        error = self.answer()
        if error is not None:
            raise error

    async def until(self, state: str, incarnation: int) -> None:
        while True:
            status = self.supervisor.status
            if (status.state, status.incarnation) == (state, incarnation):
                return
            assert await self.supervisor.wait_change(status, timeout_s=SOON_S) != status

    async def probed(self, times: int = 2) -> None:
        """Return after further probes, the first of which may have been on its way."""
        target = len(self.probes) + times
        while len(self.probes) < target:
            await asyncio.sleep(0.001)


def supervised(world: Callable[[], World], body) -> World:
    """Run ``body(world)`` beside the supervisor, and close that."""
    made: list[World] = []

    async def whole():
        made.append(world())
        running = asyncio.create_task(made[0].supervisor.run())
        try:
            await body(made[0])
        finally:
            await made[0].supervisor.close()
        await running

    run_async(whole)
    assert made[0].supervisor.state == "down" and made[0].supervisor.server is None
    return made[0]
