from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from skyrl_async.rollout.engine_supervisor import EngineSupervisor
from tests.rollout.server_processes import (
    alive,
    fake_settings,
    group_of,
    processes_in,
    run_async,
)
from tests.rollout.supervised_servers import QUICK, SOON_S, World, supervised

pytest_plugins = ("tests.sglang_server",)


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
