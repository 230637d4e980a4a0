from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.rollout.engine_launch import EngineStartError
from skyrl_async.rollout.engine_process import ExitReport, RunningServer
from skyrl_async.rollout.engine_supervisor import EngineSupervisor, RestartLimits, backoff_s
from tests.fakes import FakeClock
from tests.rollout.server_processes import (
    alive,
    fake_settings,
    group_of,
    processes_in,
    run_async,
)

pytest_plugins = ("tests.sglang_server",)

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


def test_server_is_healthy_until_closed_and_then_stopped(tmp_path):
    async def body(world):
        server = await world.supervisor.wait_healthy(timeout_s=SOON_S)
        assert server.pid == 1 and world.supervisor.server == server
        await world.probed()

    world = supervised(lambda: World(tmp_path), body)

    assert world.states == [("starting", 0), ("healthy", 1), ("down", 1)]
    assert world.started[0].stops == [QUICK.stop_timeout_s]


def test_server_that_ends_is_started_again_as_another_incarnation(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        world.started[0].die("CUDA out of memory")
        await world.until("down", 1)
        assert "return code -9" in world.supervisor.detail
        assert "CUDA out of memory" in world.supervisor.detail
        await world.until("healthy", 2)
        assert world.supervisor.server.pid == 2

    world = supervised(lambda: World(tmp_path), body)

    assert world.states[:5] == [
        *(("starting", 0), ("healthy", 1), ("down", 1)),
        *(("starting", 1), ("healthy", 2)),
    ]
    assert world.started[0].stops == [0.0], "what is left of it is killed"


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionRefusedError("no")])
def test_server_that_answers_nothing_for_the_limit_is_killed(tmp_path, error):
    async def body(world):
        await world.until("healthy", 1)
        await world.probed()
        world.answer = lambda: error
        world.clock.now += 3.9
        await world.probed()
        assert world.supervisor.state == "healthy"
        world.clock.now += 0.2
        await world.until("down", 1)
        assert "the server hung: no answer to a probe for 4.1 s" in world.supervisor.detail
        world.answer = lambda: None
        await world.until("healthy", 2)

    world = supervised(lambda: World(tmp_path, hang_timeout_s=4.0), body)

    assert world.started[0].stops == [0.0]


def test_an_answer_begins_the_limit_anew(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        for _ in range(3):
            world.answer = TimeoutError
            world.clock.now += 3.0
            await world.probed()
            world.answer = lambda: None
            await world.probed()
        assert world.supervisor.incarnation == 1 and world.supervisor.state == "healthy"

    supervised(lambda: World(tmp_path, hang_timeout_s=4.0), body)


def test_server_that_answers_late_but_goes_on_writing_its_log_is_no_hang(tmp_path):
    age_s = 1.0

    async def body(world):
        nonlocal age_s
        await world.until("healthy", 1)
        world.answer = TimeoutError
        for _ in range(3):
            world.clock.now += 3.9
            await world.probed()
        assert world.supervisor.state == "healthy"
        age_s = 5.0
        world.clock.now += 4.0
        await world.until("down", 1)

    supervised(lambda: World(tmp_path, hang_timeout_s=4.0, log_age_s=lambda: age_s), body)


def test_silence_is_no_hang_while_it_is_expected(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        world.answer = TimeoutError
        with world.supervisor.expect_silence(100.0):
            await asyncio.sleep(0.02)
            asked = len(world.probes)
            world.clock.now += 99.0
            await asyncio.sleep(0.02)
            assert len(world.probes) == asked and world.supervisor.state == "healthy"
        await world.probed()
        assert world.supervisor.state == "healthy", "the limit begins when the silence ends"
        world.clock.now += 4.0
        await world.until("down", 1)

    supervised(lambda: World(tmp_path, hang_timeout_s=4.0), body)


def test_silence_longer_than_announced_is_a_hang(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        world.answer = TimeoutError
        with world.supervisor.expect_silence(10.0), world.supervisor.expect_silence(20.0):
            world.clock.now += 23.0
            await world.probed()
            assert world.supervisor.state == "healthy"
            world.clock.now += 1.0
            await world.until("down", 1)

    supervised(lambda: World(tmp_path, hang_timeout_s=4.0), body)


def test_end_of_the_server_is_noticed_in_expected_silence(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        with world.supervisor.expect_silence(1000.0):
            world.started[0].die()
            await world.until("healthy", 2)

    supervised(lambda: World(tmp_path), body)


def test_probe_that_our_own_loop_delayed_says_nothing(tmp_path):
    async def body(world):
        await world.until("healthy", 1)

        def delayed():
            world.clock.now += 60.0
            return TimeoutError()

        world.answer = delayed
        await world.probed(5)
        assert world.supervisor.state == "healthy"

    supervised(lambda: World(tmp_path), body)


def test_restart_takes_the_server_down_at_once(tmp_path):
    async def body(world):
        await world.until("healthy", 1)
        world.supervisor.restart("weights of no version")
        assert world.supervisor.server is None and world.supervisor.state == "down"
        assert world.supervisor.detail == "weights of no version"
        world.supervisor.restart("again")
        await world.until("healthy", 2)
        assert await world.supervisor.wait_healthy(timeout_s=0) == world.supervisor.server
        await world.probed()

    world = supervised(lambda: World(tmp_path), body)

    assert len(world.started) == 2 and world.started[0].stops == [0.0]


def test_supervisor_gives_up_after_failed_starts_in_a_row(tmp_path):
    async def body():
        world = World(tmp_path, fails=lambda n: n != 2)
        running = asyncio.create_task(world.supervisor.run())
        await world.until("healthy", 1)
        world.started[1].die()
        with pytest.raises(
            EngineStartError, match=r"3 failed starts in a row.*start 5 failed"
        ) as e:
            await running
        assert "no room" in str(e.value)
        with pytest.raises(EngineStartError, match="start 5 failed"):
            await world.supervisor.wait_healthy(timeout_s=SOON_S)
        assert [s.number for s in world.started] == [1, 2, 3, 4, 5], "a success counts anew"
        await world.supervisor.close()

    run_async(body)


def test_waiting_for_a_healthy_server_ends_with_the_time_or_the_supervisor(tmp_path):
    async def body():
        limits = RestartLimits(first_backoff_s=50, max_backoff_s=50)
        world = World(tmp_path, fails=lambda n: True, limits=limits)
        running = asyncio.create_task(world.supervisor.run())
        await world.until("down", 0)
        with pytest.raises(RuntimeError, match=r"within 0 s: down.*start 1 failed"):
            await world.supervisor.wait_healthy(timeout_s=0)
        waiting = asyncio.create_task(world.supervisor.wait_healthy(timeout_s=600))
        await asyncio.sleep(0)
        await world.supervisor.close()
        with pytest.raises(RuntimeError, match="no healthy SGLang server"):
            await waiting
        await running
        with pytest.raises(RuntimeError, match="make a new EngineSupervisor"):
            await world.supervisor.run()

    run_async(body)


def test_cancelling_run_stops_the_server(tmp_path):
    async def body():
        world = World(tmp_path)
        running = asyncio.create_task(world.supervisor.run())
        await world.until("healthy", 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert world.started[0].stops == [QUICK.stop_timeout_s]

    run_async(body)


def test_back_off_begins_anew_after_a_healthy_period(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(
        "skyrl_async.rollout.engine_supervisor.backoff_s",
        lambda failures, **_: asked.append(failures) or 0.0,
    )

    async def body(world):
        for incarnation, lived_s in enumerate((1.0, 59.0, 60.0, 1.0), start=1):
            await world.until("healthy", incarnation)
            world.clock.now += lived_s
            world.started[-1].die()
        await world.until("healthy", 5)

    supervised(lambda: World(tmp_path), body)

    assert asked == [1, 2, 1, 2]


@given(
    failures=st.integers(1, 10**6),
    first_s=st.floats(0.001, 10),
    max_s=st.floats(10, 1000),
)
def test_back_off_doubles_up_to_its_cap(failures, first_s, max_s):
    now = backoff_s(failures, first_s=first_s, max_s=max_s)
    following = backoff_s(failures + 1, first_s=first_s, max_s=max_s)
    assert first_s <= now <= following <= max_s
    assert following == min(max_s, 2 * now)
    assert backoff_s(0, first_s=first_s, max_s=max_s) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_failed_starts": 0}, "max_failed_starts must be > 0, got 0"),
        ({"stop_timeout_s": -1.0}, "stop_timeout_s must be >= 0"),
        ({"first_backoff_s": 99.0}, "between 0 and max_backoff_s 60, got 99"),
    ],
)
def test_wrong_limits_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RestartLimits(**changes)


def test_probe_that_does_not_fit_into_the_limit_is_refused(tmp_path):
    async def body():
        with pytest.raises(ValueError, match="below hang_timeout_s 1, got 2"):
            EngineSupervisor(
                fake_settings(tmp_path, python=tmp_path), hang_timeout_s=1, probe_interval_s=2
            )

    run_async(body)


def test_process_that_stops_answering_is_replaced_and_nothing_of_it_left(tmp_path):
    settings = fake_settings(tmp_path)

    async def body():
        supervisor = EngineSupervisor(
            settings, hang_timeout_s=1.0, probe_interval_s=0.05, limits=QUICK
        )
        running = asyncio.create_task(supervisor.run())
        first = await supervisor.wait_healthy(timeout_s=SOON_S)
        os.kill(first.pid, signal.SIGSTOP)
        status = supervisor.status
        while status.incarnation == 1:
            status = await supervisor.wait_change(status, timeout_s=SOON_S)
        assert not alive(processes_in(settings.log_path)[:3])
        assert supervisor.server is not None and supervisor.server != first
        await supervisor.close()
        await running

    run_async(body)

    assert not alive(processes_in(settings.log_path))


@pytest.mark.sglang
@pytest.mark.timeout(400)
def test_real_server_whose_scheduler_stops_is_down_within_five_seconds(sglang_settings, tmp_path):
    settings = sglang_settings(tmp_path / "server.log")

    async def body():
        supervisor = EngineSupervisor(settings, limits=QUICK)
        running = asyncio.create_task(supervisor.run())
        try:
            first = await supervisor.wait_healthy(timeout_s=settings.start_timeout_s)
            seen = supervisor.status
            await asyncio.sleep(2.5)
            assert supervisor.status == seen, "an idle server answers probes"
            stop_scheduler(first.pid)
            with supervisor.expect_silence(6.0):
                assert await supervisor.wait_change(seen, timeout_s=5.5) == seen
                began_s = time.monotonic()
            down = await supervisor.wait_change(seen, timeout_s=SOON_S)
            took_s = time.monotonic() - began_s
            assert down.state == "down" and "hung" in down.detail
            await supervisor.wait_healthy(timeout_s=settings.start_timeout_s)
            assert not group_of(first.pid)
        finally:
            await supervisor.close()
        await running
        return took_s

    assert run_async(body, timeout_s=300) < 5.0


def stop_scheduler(leader: int) -> None:
    (scheduler,) = [
        pid
        for pid in group_of(leader)
        if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(scheduler, signal.SIGSTOP)
