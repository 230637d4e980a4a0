import asyncio
import math
import os
import select
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from skyrl_async.environments import worker_pool, worker_process
from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.types import DropReason
from tests.environments.playing import (
    MODULE,
    failure_of_reset,
    failure_of_step,
    hosted,
    make_task,
    play_to_the_end,
)


def wait_until_ended(pidfds, *, timeout_s=10):
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], timeout_s)[0], "a process is still there"


def never_stuck(monkeypatch):
    """Have episodes wait for a hanging one in their process until that is killed."""
    monkeypatch.setattr(worker_process, "STUCK_AFTER_S", math.inf)
    monkeypatch.setattr(worker_pool, "STUCK_AFTER_S", math.inf)


def test_hangs_are_killed_at_the_deadline_and_bystanders_lose_nothing(monkeypatch):
    never_stuck(monkeypatch)

    async def main():
        async with hosted("Troublesome", num_processes=1, step_timeout_s=1.0) as host:
            bystanders = [await host.open_session(seed=seed) for seed in range(10, 15)]
            for session in bystanders:
                await session.step("one")
            for count, hang in ((2, "sleep"), (3, "ignore_sigterm")):
                hung = asyncio.create_task(failure_of_step(host, hang))
                # Some wait behind the hanging call, the others are idle meanwhile.
                waiting = [asyncio.create_task(s.step("two")) for s in bystanders[:3]]
                failure = await hung
                assert failure.reason is DropReason.STEP_TIMEOUT
                assert "step took longer than 1.0 s" in failure.detail
                outcomes = await asyncio.gather(*waiting, *(s.step("two") for s in bystanders[3:]))
                expected = [f"{seed} {count} two" for seed in range(10, 15)]
                assert [outcome.observation for outcome in outcomes] == expected
            assert all(outcome.terminated for outcome in outcomes)
            # The time that a process was idle does not count, and does not end the watch.
            await asyncio.sleep(1.2)
            await play_to_the_end(host, seed=1)
            await asyncio.sleep(0.5)
            failure = await failure_of_reset(host, reset="busy")
            assert failure.reason is DropReason.STEP_TIMEOUT

    asyncio.run(main())


@pytest.mark.parametrize("num_processes", [1, 2])
def test_episodes_leave_a_process_that_is_stuck_long_before_the_deadline(num_processes):
    async def main():
        settings = {
            "num_processes": num_processes,
            "step_timeout_s": 60.0,
            "close_timeout_s": 0.1,
        }
        async with hosted("Troublesome", **settings) as host:
            bystanders = [await host.open_session(seed=seed) for seed in range(10, 20)]
            for session in bystanders:
                await session.step("one")
            session = await host.open_session(seed=1)
            hung = asyncio.create_task(session.step("busy"))
            await asyncio.sleep(0)
            for count in (2, 3):
                outcomes = await asyncio.gather(*(s.step("go") for s in bystanders))
                expected = [f"{seed} {count} go" for seed in range(10, 20)]
                assert [outcome.observation for outcome in outcomes] == expected
            await asyncio.gather(*(play_to_the_end(host, seed=seed) for seed in range(100)))
            assert not hung.done()
            hung.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hung
            await session.close()

    asyncio.run(main())


def test_a_call_that_is_only_slow_is_answered(tmp_path):
    file = tmp_path / "go on"

    async def main():
        async with hosted("Troublesome", num_processes=1) as host:
            slow, quick = [await host.open_session(seed=seed) for seed in (1, 2)]
            waited = asyncio.create_task(slow.step(f"wait for {file}"))
            await asyncio.sleep(0)
            assert (await quick.step("go")).observation == "2 1 go"
            assert not waited.done()
            file.touch()
            assert (await waited).observation == f"1 1 wait for {file}"
            for session in (slow, quick):
                assert (await session.step("on")).observation.endswith("2 on")
                await session.close()

    asyncio.run(main())


def test_processes_that_end_cost_one_episode():
    async def main():
        async with hosted("Troublesome", num_processes=1) as host:
            bystander = await host.open_session(seed=8)
            failure = await failure_of_step(host, "os_exit")
            assert failure.reason is DropReason.ENVIRONMENT_ERROR
            assert "exit code 7 during step" in failure.detail
            assert (await bystander.step("one")).observation == "8 1 one"
            failure = await failure_of_step(host, "segfault")
            assert f"signal {int(signal.SIGSEGV)} during step" in failure.detail
            assert (await bystander.step("two")).observation == "8 2 two"
            failure = await failure_of_step(host, "keyboard_interrupt")
            assert "step raised KeyboardInterrupt" in failure.detail
            assert (await bystander.step("three")).terminated
            await bystander.close()

    asyncio.run(main())


def test_an_episode_that_keeps_losing_its_process_fails(monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_MOVES", 2)

    async def main():
        async with hosted("Troublesome", num_processes=1) as host:
            bystander = await host.open_session(seed=8)
            for loss in range(3):
                breaker = await host.open_session(seed=1)
                ending = asyncio.create_task(breaker.step("os_exit"))
                await asyncio.sleep(0)
                # The bystander waits behind the call that ends the process.
                moved = asyncio.create_task(bystander.step("go"))
                with pytest.raises(EnvironmentFailure, match="exit code 7"):
                    await ending
                await breaker.close()
                if loss < 2:
                    assert (await moved).reward == 1.0
            with pytest.raises(EnvironmentFailure, match="and so did 2 before it"):
                await moved

    asyncio.run(main())


def test_an_environment_that_is_not_reproducible_is_not_continued():
    async def main():
        name = f"{MODULE}:SaysItsProcess"
        host = EnvironmentHost(name, num_processes=1)
        bystander, breaker = [await host.open(make_task(name, seed=s)) for s in (1, 2)]
        assert await bystander.reset() == await breaker.reset()
        with pytest.raises(EnvironmentFailure, match="exit code 7"):
            await breaker.step("os_exit")
        with pytest.raises(EnvironmentFailure, match="call 0 was answered differently") as caught:
            await bystander.step("go")
        assert caught.value.reason is DropReason.ENVIRONMENT_ERROR
        await bystander.close()
        await breaker.close()
        await host.close()

    asyncio.run(main())


def test_a_call_that_waits_when_the_host_closes_is_shut_down():
    async def main():
        async with hosted("Troublesome", num_processes=1, close_timeout_s=0.1) as host:
            hung, waiting = [await host.open_session(seed=seed) for seed in (1, 2)]
            calls = [asyncio.create_task(s.step(r)) for s, r in ((hung, "busy"), (waiting, "go"))]
            await asyncio.sleep(0)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [result.reason for result in results] == [DropReason.SHUTDOWN] * 2

    asyncio.run(main())


def test_no_process_remains_after_close_not_even_what_environments_started():
    async def main(stack):
        name = f"{MODULE}:StartsChildren"
        host = EnvironmentHost(name, num_processes=2)
        sessions = [await host.open(make_task(name, seed=seed)) for seed in range(2)]
        workers = {int(await session.reset()) for session in sessions}
        children = {int((await session.step("")).observation) for session in sessions}
        pidfds = [os.pidfd_open(pid) for pid in workers | children]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        assert not select.select(pidfds, [], [], 0)[0]
        await host.close()
        return workers, pidfds

    with ExitStack() as stack:
        workers, pidfds = asyncio.run(main(stack))
        wait_until_ended(pidfds)
        for pid in workers:
            assert not os.path.exists(f"/proc/{pid}"), "a worker was not reaped"


def test_open_environments_are_closed_with_the_host(tmp_path):
    async def main():
        name = f"{MODULE}:NoticesClose"
        host = EnvironmentHost(name, {"path": str(tmp_path / "log")}, num_processes=1)
        for seed in range(3):
            session = await host.open(make_task(name, seed=seed))
            await session.reset()
        await session.close()
        await host.close()

    asyncio.run(main())
    assert (tmp_path / "log").read_text() == "closed\n" * 3


def test_a_hang_in_close_costs_no_episode(caplog):
    async def main():
        settings = {"num_processes": 1, "step_timeout_s": 0.5, "close_timeout_s": 0.1}
        async with hosted("Troublesome", {"close": "sleep"}, **settings) as host:
            finished, bystander = [await host.open_session(seed=seed) for seed in (1, 2)]
            await finished.close()
            assert (await bystander.step("go")).observation == "2 1 go"

    asyncio.run(main())
    assert "its process ended in close" in caplog.text


PARENT = """
import asyncio, os, sys
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.types import Task

async def main():
    name = "tests.environments.misbehaving:SaysItsProcess"
    host = EnvironmentHost(name, num_processes=1)
    session = await host.open(Task(task_id="a", environment=name, seed=0))
    print(await session.reset(), flush=True)
    await session.step("busy")

asyncio.run(main())
"""


def test_a_busy_process_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        wait_until_ended([pidfd])
    finally:
        os.close(pidfd)


def test_what_an_environment_prints_goes_to_standard_error(capfd):
    async def main():
        async with hosted("Noisy", num_processes=1) as host:
            await play_to_the_end(host, seed=3)

    asyncio.run(main())
    out, err = capfd.readouterr()
    assert out == ""
    for noise in ('["reset", 1]', "raw noise", "child noise", "error noise"):
        assert noise in err


def test_an_environment_that_reads_standard_input_gets_nothing():
    async def main():
        async with hosted("ReadsInput", num_processes=1) as host:
            session = await host.open_session()
            assert (await session.step("go")).observation == "''"
            await session.close()

    asyncio.run(main())


def test_a_process_that_cannot_import_the_class_says_why(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "import os\n"
        f"if os.getpid() != {os.getpid()}:\n"
        "    raise OSError('no such drive')\n"
        f"from {MODULE} import Troublesome as Base\n"
        "class Game(Base):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        name = "only_here:Game"
        host = EnvironmentHost(name, num_processes=1)
        session = await host.open(make_task(name))
        with pytest.raises(EnvironmentFailure, match=r"not start.*no such drive") as caught:
            await session.reset()
        assert caught.value.reason is DropReason.ENVIRONMENT_ERROR
        await session.close()
        await host.close()

    asyncio.run(main())


def test_a_process_that_does_not_become_ready_is_killed(tmp_path, monkeypatch):
    (tmp_path / "slow_here.py").write_text(
        "import os, time\n"
        f"if os.getpid() != {os.getpid()}:\n"
        "    time.sleep(1000)\n"
        f"from {MODULE} import Troublesome as Base\n"
        "class Game(Base):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        name = "slow_here:Game"
        host = EnvironmentHost(name, num_processes=1, startup_timeout_s=0.3)
        session = await host.open(make_task(name))
        with pytest.raises(EnvironmentFailure, match=r"was not ready after 0\.3 s"):
            await session.reset()
        await host.close()

    asyncio.run(main())


def test_extras_that_are_not_json_fail_their_episode():
    async def main():
        async with hosted("Troublesome", num_processes=1) as host:
            failure = await failure_of_reset(host, when={1, 2})
            assert failure.reason is DropReason.ENVIRONMENT_ERROR
            assert "extras are not JSON" in failure.detail
            await play_to_the_end(host, seed=1)

    asyncio.run(main())


def test_a_worker_does_not_import_torch():
    code = (
        "import sys, skyrl_async.environments.worker; "
        "sys.exit(bool({'torch', 'transformers', 'ray', 'gymnasium'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
