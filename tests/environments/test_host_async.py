import asyncio

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.types import DropReason
from tests.environments.playing import failure_of_step, hosted, play_to_the_end


def whats(log):
    return [what for what, _ in log]


def assert_only_this_task_is_left():
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_hang_is_cancelled_and_the_environment_closed():
    log = []

    async def main():
        async with hosted("AsyncTroublesome", {"log": log}, step_timeout_s=0.1) as host:
            failure = await failure_of_step(host, "hang")
            assert failure.reason is DropReason.STEP_TIMEOUT
            await play_to_the_end(host, seed=1)
        assert_only_this_task_is_left()

    asyncio.run(main())
    assert whats(log)[:3] == ["reset", "step", "cancelled"]
    assert whats(log).count("closed") == 2


@pytest.mark.parametrize("reply", ["swallow", "swallow_all"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_swallowed_cancellation_does_not_hang_anything(reply):
    log = []

    async def main():
        settings = {"step_timeout_s": 0.1, "close_timeout_s": 0.1}
        async with hosted("AsyncTroublesome", {"log": log}, **settings) as host:
            failure = await failure_of_step(host, reply)
            assert failure.reason is DropReason.STEP_TIMEOUT
        assert_only_this_task_is_left()

    asyncio.run(main())
    assert "swallowed" in whats(log)
    assert whats(log)[-1] == "closed"


def test_an_environment_that_swallows_in_step_and_close_is_left_behind(monkeypatch):
    from skyrl_async.environments import async_session

    monkeypatch.setattr(async_session, "CANCEL_GRACE_S", 0.05)
    log = []

    async def main():
        settings = {"step_timeout_s": 0.1, "close_timeout_s": 0.1}
        async with hosted("SwallowsEverywhere", {"log": log}, **settings) as host:
            await failure_of_step(host, "swallow")
        assert_only_this_task_is_left()

    asyncio.run(main())
    assert whats(log)[-2:] == ["closing", "swallowed"]


def test_closing_a_session_alone_ends_a_swallowing_environment(monkeypatch):
    from skyrl_async.environments import async_session

    monkeypatch.setattr(async_session, "CANCEL_GRACE_S", 0.05)

    async def main():
        async with hosted("SwallowsEverywhere", step_timeout_s=0.1) as host:
            session = await host.open_session()
            server = session.server
            with pytest.raises(EnvironmentFailure):
                await session.step("swallow")
            await session.close()
            await asyncio.wait({server}, timeout=10)
            assert server.done()

    asyncio.run(main())


def test_timeouts_that_the_environment_sets_itself_are_its_own():
    log = []

    async def main():
        async with hosted("AsyncTroublesome", {"log": log}) as host:
            session = await host.open_session(seed=4)
            assert (await session.step("own_timeouts")).observation == "4 1 own_timeouts"
            assert (await session.step("go")).observation == "4 2 go"
            await session.close()

    asyncio.run(main())
    assert whats(log).count("own timeout") == 3


def test_all_calls_of_an_episode_run_in_one_task():
    log = []

    async def main():
        async with hosted("AsyncTroublesome", {"log": log}) as host:
            await play_to_the_end(host, seed=1)

    asyncio.run(main())
    assert whats(log) == ["reset", "step", "step", "step", "closed"]
    assert len({task for _, task in log}) == 1


def test_cancelling_the_caller_cancels_and_closes_the_environment():
    log = []

    async def main():
        async with hosted("AsyncTroublesome", {"log": log}) as host:
            session = await host.open_session()
            step = asyncio.create_task(session.step("hang"))
            while "step" not in whats(log):
                await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            with pytest.raises(RuntimeError, match="has failed"):
                await session.step("go")
            await session.close()
            await asyncio.wait({session.server}, timeout=10)
            assert whats(log)[-1] == "closed"

    asyncio.run(main())


def test_the_deadline_of_a_call_counts_from_its_own_start():
    log = []

    async def main():
        loop = asyncio.get_running_loop()
        passed_s, real_time = [0.0], loop.time
        loop.time = lambda: real_time() + passed_s[0]

        async def pass_until(seconds):
            passed_s[0] = seconds
            for _ in range(10):
                await asyncio.sleep(0)

        async with hosted("AsyncTroublesome", {"log": log}, step_timeout_s=10.0) as host:
            session = await host.open_session()
            await pass_until(8.0)
            hung = asyncio.create_task(session.step("hang"))
            await pass_until(11.0)
            assert not hung.done() and "cancelled" not in whats(log)
            await pass_until(19.0)
            with pytest.raises(EnvironmentFailure) as caught:
                async with asyncio.timeout(10):
                    await hung
            assert caught.value.reason is DropReason.STEP_TIMEOUT
            await session.close()
        assert_only_this_task_is_left()

    asyncio.run(main())
    assert whats(log) == ["reset", "step", "cancelled", "closed"]


def test_others_are_played_while_one_hangs():
    async def main():
        settings = {"step_timeout_s": 60.0, "close_timeout_s": 0.0}
        async with hosted("AsyncTroublesome", **settings) as host:
            session = await host.open_session()
            hung = asyncio.create_task(session.step("hang"))
            await asyncio.gather(*(play_to_the_end(host, seed=seed) for seed in range(100)))
            assert not hung.done()
            hung.cancel()
            await asyncio.wait({hung}, timeout=10)

    asyncio.run(main())
