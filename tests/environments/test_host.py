"""What every way of running an environment does the same."""

import asyncio

import pytest

from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.types import DropReason, Task
from tests.environments.playing import (
    MODULE,
    failure_of_reset,
    failure_of_step,
    hosted,
    make_task,
    play_to_the_end,
)

WAYS = {
    "in_process": ("Troublesome", {"in_process": True}),
    "subprocess": ("Troublesome", {"num_processes": 1}),
    "async": ("AsyncTroublesome", {}),
}
REASONS = {
    DropReason.ENVIRONMENT_ERROR: (
        *("raise", "system_exit", "cancelled", "stop_iteration", "memory_error", "recursion"),
        *("four", "text", "bytes", "not_bool", "info_none"),
    ),
    DropReason.NONFINITE_REWARD: (
        *("reward_nan", "reward_inf", "reward_huge", "reward_numpy_nan"),
        *("reward_none", "reward_str", "reward_complex", "reward_decimal"),
    ),
    DropReason.OVERLONG_OBSERVATION: ("flood",),
}
every_way = pytest.mark.parametrize("way", WAYS)


def run_hosted(way, play, **more):
    class_name, settings = WAYS[way]

    async def main():
        async with hosted(class_name, **settings, **more) as host:
            await play(host)

    asyncio.run(main())


@every_way
def test_an_episode_is_played_to_its_end(way):
    async def play(host):
        await asyncio.gather(*(play_to_the_end(host, seed=seed) for seed in range(20)))

    run_hosted(way, play)


@every_way
def test_each_failure_has_its_reason_and_costs_its_own_episode_only(way):
    async def play(host):
        bystander = await host.open_session(seed=77)
        for reason, replies in REASONS.items():
            for reply in replies:
                failure = await failure_of_step(host, reply)
                assert failure.reason is reason, (reply, failure)
        assert (await bystander.step("go")).observation == "77 1 go"
        await bystander.close()

    run_hosted(way, play)


@every_way
def test_a_failing_reset_says_why(way):
    async def play(host):
        failure = await failure_of_reset(host, reset="raise")
        assert failure.reason is DropReason.ENVIRONMENT_ERROR
        assert "reset raised ValueError: the dice fell off" in failure.detail
        assert "misbehaving.py:" in failure.detail
        await play_to_the_end(host, seed=1)

    run_hosted(way, play)


@every_way
def test_a_failing_constructor_says_why(way):
    async def play(host):
        failure = await failure_of_reset(host)
        assert failure.reason is DropReason.ENVIRONMENT_ERROR
        assert "raised ValueError: the dice fell off" in failure.detail

    run_hosted(way, play, options={"init": "raise"})


@every_way
def test_numpy_and_bool_values_are_accepted_and_made_plain(way):
    async def play(host):
        session = await host.open_session()
        outcome = await session.step("reward_numpy")
        assert (outcome.reward, outcome.terminated, outcome.truncated) == (0.5, True, False)
        assert type(outcome.reward) is float
        assert type(outcome.terminated) is type(outcome.truncated) is bool
        outcome = await session.step("reward_bool")
        assert outcome.reward == 1.0
        assert type(outcome.reward) is float
        await session.close()

    run_hosted(way, play)


@every_way
def test_text_of_any_kind_survives_and_lone_surrogates_are_replaced(way):
    async def play(host):
        session = await host.open_session(seed=5)
        reply = 'zażółć 漢字 \U0001f600 \x00 \u2028 "quoted" \\ \n end'
        assert (await session.step(reply)).observation == f"5 1 {reply}"
        assert (await session.step("surrogate")).observation == "a\ufffdb"
        assert (await session.step("surrogate_pair")).observation == "a\U0001f600b"
        await session.close()

    run_hosted(way, play)


@every_way
def test_a_session_refuses_calls_out_of_order(way):
    async def play(host):
        name = f"{MODULE}:{WAYS[way][0]}"
        session = await host.open(make_task(name))
        with pytest.raises(RuntimeError, match="call reset first"):
            await session.step("go")
        await session.reset()
        with pytest.raises(RuntimeError, match="open another"):
            await session.reset()
        await session.close()
        await session.close()
        with pytest.raises(RuntimeError, match="call reset first"):
            await session.step("go")

    run_hosted(way, play)


@every_way
def test_a_task_for_another_environment_is_refused(way):
    async def play(host):
        with pytest.raises(ValueError, match="is for environment 'chess'"):
            await host.open(Task(task_id="a", environment="chess", seed=0))

    run_hosted(way, play)


def test_a_closed_host_opens_nothing():
    async def main():
        host = EnvironmentHost("number_guess", in_process=True)
        await host.close()
        with pytest.raises(RuntimeError, match="closed"):
            await host.open(make_task("number_guess"))

    asyncio.run(main())


def test_in_process_ctrl_c_passes():
    async def play(host):
        session = await host.open_session()
        with pytest.raises(KeyboardInterrupt):
            await session.step("keyboard_interrupt")

    run_hosted("in_process", play)


def test_in_process_methods_never_suspend():
    async def opened():
        host = EnvironmentHost("number_guess", in_process=True)
        session = await host.open(make_task("number_guess"))
        await session.reset()
        await session.step("1")
        await session.close()

    with pytest.raises(StopIteration):
        opened().send(None)


def test_a_failing_close_is_logged_and_loses_nothing(caplog):
    async def play(host):
        await play_to_the_end(host, seed=1)

    run_hosted("in_process", play, options={"close": "raise"})
    run_hosted("subprocess", play, options={"close": "raise"})
    assert len([r for r in caplog.records if "close raised ValueError" in r.message]) == 2


def test_classes_that_a_subprocess_cannot_get_are_refused(monkeypatch):
    from tests.environments import misbehaving

    monkeypatch.setattr(misbehaving.Troublesome, "__module__", "__main__")
    with pytest.raises(ValueError, match="in_process=true"):
        EnvironmentHost(f"{MODULE}:Troublesome")


def test_options_that_are_not_json_are_refused_by_name():
    with pytest.raises(ValueError, match="option 'close' cannot travel"):
        EnvironmentHost(f"{MODULE}:Troublesome", {"close": object()})
