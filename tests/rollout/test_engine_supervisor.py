from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.rollout.engine_launch import EngineStartError
from skyrl_async.rollout.engine_supervisor import RestartLimits, backoff_s
from tests.rollout.server_processes import (
    run_async,
)
from tests.rollout.supervised_servers import QUICK, SOON_S, World, supervised


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
