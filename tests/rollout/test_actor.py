from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.rollout.actor import RolloutActor, RolloutSettings
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.rollout.episode import EpisodeLimits
from skyrl_async.rollout.slots import PARTS
from skyrl_async.types import (
    Assignment,
    DroppedGroup,
    DropReason,
    RolloutReport,
    Sampling,
    Task,
    TrajectoryGroup,
)
from tests.fakes import FakeClock, FakeEngine, FakeSession, FakeSessions, outcome
from tests.rollout.embedded_engine_cases import roughened, weights_of
from tests.rollout.test_chat import encode

TOKENIZER = build_tiny_tokenizer()
CHAT = Chat(TOKENIZER)
(STOP,) = CHAT.stop_token_ids
EIGHT, FIVE = encode(TOKENIZER, "8 5")
DEADLINE_S = 10.0
LONG_S = 5.0
"""For a poll that is answered long before."""


def task(number: int) -> Task:
    return Task(task_id=f"t/{number}", environment="number_guess", seed=number)


def assignments(*group_ids: int) -> list[Assignment]:
    return [Assignment(group_id=i, task=task(i)) for i in group_ids]


def one_turn(task: Task) -> FakeSession:
    return FakeSession("guess", outcome(reward=float(task.seed), terminated=True))


def no_evaluation(endpoint):
    raise AssertionError("no evaluation was asked for")


def make_actor(
    engine,
    sessions,
    *,
    evaluation_engine: Callable = no_evaluation,
    report_interval_s: float = 0.0,
    clock: Callable[[], float] | None = None,
    group_size: int = 2,
    context_length: int = 64,
) -> RolloutActor:
    return RolloutActor(
        engine=engine,
        evaluation_engine=evaluation_engine,
        sessions=sessions,
        chat=CHAT,
        settings=RolloutSettings(
            group_size=group_size,
            sampling=Sampling(max_tokens=3, stop_token_ids=(STOP,)),
            limits=EpisodeLimits(max_turns=8, context_length=context_length, timeout_s=60.0),
            report_interval_s=report_interval_s,
        ),
        clock=clock or FakeClock(),
    )


def run(body):
    """Run ``body(start)``, where ``start(actor)`` runs an actor; then nothing may be left over."""

    async def whole():
        running: list[tuple[RolloutActor, asyncio.Task]] = []

        def start(actor: RolloutActor) -> RolloutActor:
            running.append((actor, asyncio.create_task(actor.run())))
            return actor

        async with asyncio.timeout(DEADLINE_S):
            try:
                return await body(start)
            finally:
                for actor, runner in running:
                    await actor.close()
                    runner.cancel()
                    await asyncio.gather(runner, return_exceptions=True)
                await asyncio.sleep(0)  # cancelled waits of the fakes end here
                assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(whole())


async def groups_of(actor: RolloutActor, count: int) -> list[TrajectoryGroup | DroppedGroup]:
    groups: list[TrajectoryGroup | DroppedGroup] = []
    while len(groups) < count:
        groups += (await actor.poll(wait_s=LONG_S)).groups
    return groups


def test_groups_are_in_flight_together():
    all_live = asyncio.Event()

    async def until_all_are_live(call):
        if len(engine.live) == 6:
            all_live.set()
        await all_live.wait()

    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=until_all_are_live)
    sessions = FakeSessions(one_turn)

    async def body(start):
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0, 1))
        actor.submit(assignments(2))
        return await groups_of(actor, 3)

    groups = run(body)

    assert engine.most_live == 6
    assert sorted(group.group_id for group in groups) == [0, 1, 2]
    for group in groups:
        assert group.task_id == f"t/{group.group_id}"
        assert [t.reward for t in group.trajectories] == [float(group.group_id)] * 2
    assert len(sessions.opened) == 6 and sessions.all_closed
    assert sorted(engine.released) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]


def test_finished_group_is_reported_once_and_a_quiet_poll_is_empty():
    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(one_turn)))
        actor.submit(assignments(4))
        first = await actor.poll(wait_s=LONG_S)
        assert [group.group_id for group in first.groups] == [4]
        for _ in range(2):
            report = await actor.poll(wait_s=0.01)
            assert isinstance(report, RolloutReport) and report.groups == ()

    run(body)


def test_groups_that_finish_within_the_interval_share_a_report():
    released = [asyncio.Event() for _ in range(4)]

    async def until_released(call):
        await released[int(call.session_id.split("-")[0])].wait()

    class ReleasesTheNext(FakeSession):
        """The end of a group's first session lets the next group go on."""

        async def close(self):
            await super().close()
            following = self.number + 1
            if 2 <= following < 4:
                released[following].set()

    def make(task):
        session = ReleasesTheNext("guess", outcome(terminated=True))
        session.number = task.seed
        return session

    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=until_released)

    async def body(start):
        actor = start(make_actor(engine, FakeSessions(make), report_interval_s=0.1))
        actor.submit(assignments(0, 1, 2, 3))
        released[0].set()
        first = await actor.poll(wait_s=LONG_S)
        released[1].set()
        second = await actor.poll(wait_s=LONG_S)
        return [[group.group_id for group in r.groups] for r in (first, second)]

    assert run(body) == [[0], [1, 2, 3]], "the first is not held back, the others come together"


def test_group_without_enough_members_is_reported_as_dropped():
    def make(task):
        broken = EnvironmentFailure(DropReason.ENVIRONMENT_ERROR, f"{task.task_id}: boom")
        return FakeSession("guess", broken if task.seed else outcome(terminated=True))

    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(make)))
        actor.submit(assignments(0, 1))
        return {group.group_id: group for group in await groups_of(actor, 2)}

    groups = run(body)

    assert isinstance(groups[0], TrajectoryGroup)
    assert groups[1] == DroppedGroup(
        group_id=1,
        reason=DropReason.ENVIRONMENT_ERROR,
        failures=(DropReason.ENVIRONMENT_ERROR,) * 2,
        detail="t/1: boom",
    )


def test_swap_wakes_a_poll_that_reports_the_new_version():
    async def body(start):
        engine = FakeEngine(lambda call: [EIGHT, STOP])
        actor = start(make_actor(engine, FakeSessions(one_turn)))
        polling = asyncio.create_task(actor.poll(wait_s=LONG_S))
        await asyncio.sleep(0)
        engine.swap(3)
        actor.engine_swapped()
        report = await polling
        assert (report.engine_version, report.groups) == (3, ())

    run(body)


def test_report_says_where_the_time_of_engine_and_slots_went():
    clock = FakeClock()

    async def think(call):
        clock.now += 3

    async def body(start):
        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=think)
        actor = start(make_actor(engine, FakeSessions(one_turn), clock=clock))
        actor.submit(assignments(0))
        return await actor.poll(wait_s=LONG_S)

    started_s = clock.now
    report = run(body)

    assert sum(report.seconds.values()) == 2 * (clock.now - started_s) == 2 * 2 * 3
    assert report.seconds["generate"] >= 2 * 3 and report.seconds["wait_admission"] == 0
    assert report.seconds.keys() == set(PARTS)
    assert report.engine_seconds == {
        "generate": 1.75,
        "swap": 0.25,
        "wait_episodes": 1.0,
        "idle": 1.0,
    }
    assert report.counts["generated_tokens"] == 4
    assert report.counts["reprefilled_tokens"] == 3
    assert report.maxima["longest_gap_decode_steps"] == 2.0


def test_death_of_the_engine_surfaces_in_the_waiting_poll_and_in_every_later_one():
    async def body(start):
        blocked = asyncio.Event()

        async def block(call):
            blocked.set()
            await asyncio.Event().wait()

        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=block)
        sessions = FakeSessions(one_turn)
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0))
        polling = asyncio.create_task(actor.poll(wait_s=LONG_S))
        await blocked.wait()
        engine.die(ValueError("the weights are gone"))
        for poll in (polling, actor.poll(wait_s=LONG_S)):
            with pytest.raises(RuntimeError, match=r"rollout actor.*the weights are gone"):
                await poll
        await actor.close()
        assert sessions.all_closed and sorted(engine.released) == ["0-0", "0-1"]

    run(body)


def test_programming_error_in_a_group_surfaces_in_poll():
    def make(task):
        return FakeSession("guess", ZeroDivisionError("a bug"))

    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(make)))
        actor.submit(assignments(0))
        with pytest.raises(RuntimeError, match=r"ZeroDivisionError\('a bug'\)"):
            await actor.poll(wait_s=LONG_S)

    run(body)


def test_close_cancels_groups_and_frees_their_environments():
    async def body(start):
        all_live = asyncio.Event()

        async def block(call):
            if len(engine.live) == 4:
                all_live.set()
            await asyncio.Event().wait()

        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=block)
        sessions = FakeSessions(one_turn)
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0, 1))
        await all_live.wait()
        await actor.close()
        assert len(sessions.opened) == 4 and sessions.all_closed
        assert not engine.live and len(engine.released) == 4
        report = await actor.poll(wait_s=0.01)
        assert report.groups == (), "what they had is lost, and being cancelled is no failure"

    run(body)


def test_evaluation_plays_greedily_on_an_engine_of_its_own():
    training = FakeEngine(lambda call: [EIGHT, STOP], policy_version=5)
    engines: list[FakeEngine] = []

    def evaluation_engine(endpoint):
        assert endpoint is None
        engines.append(FakeEngine(lambda call: [FIVE, STOP], policy_version=5))
        return engines[-1]

    def make(task):
        if task.seed == 2:
            return FakeSession(EnvironmentFailure(DropReason.STEP_TIMEOUT, "too slow"))
        return one_turn(task)

    async def body(start):
        sessions = FakeSessions(make)
        actor = start(make_actor(training, sessions, evaluation_engine=evaluation_engine))
        result = await actor.evaluate([task(i) for i in range(4)])
        assert sessions.all_closed
        return result

    result = run(body)

    (engine,) = engines
    assert (result.policy_version, result.num_tasks, result.num_failures) == (5, 4, 1)
    assert result.mean_reward == (0 + 1 + 0 + 3) / 4, "a failed task counts 0"
    assert {call.sampling.temperature for call in engine.calls} == {0.0}
    assert training.calls == [] and not engine.running


def test_evaluation_keeps_its_version_while_the_training_engine_swaps():
    """The same tasks are played twice, the second time with a swap in the middle."""
    model = roughened(build_tiny_model(hidden_size=16, num_layers=1, num_heads=2), seed=1)
    other = weights_of(roughened(copy.deepcopy(model), seed=2))
    options = {"max_concurrent": 4, "context_length": 64}

    async def body(start):
        training = EmbeddedEngine(model, **options)
        swaps: list[asyncio.Task] = []
        results, replies = [], []
        for round_ in (0, 1):

            async def swap_at_second_turn(round_=round_):
                if round_ and not swaps:
                    load = training.load_weights(other, policy_version=1)
                    swaps.append(asyncio.create_task(load))
                    await swaps[0]
                return outcome("higher")

            def make(task, step=swap_at_second_turn):
                return FakeSession("guess", step, outcome("lower"), outcome(terminated=True))

            sessions = FakeSessions(make)
            actor = make_actor(
                training,
                sessions,
                evaluation_engine=lambda _: EmbeddedEngine(
                    copy.deepcopy(model), policy_version=training.policy_version, **options
                ),
            )
            results.append(await actor.evaluate([task(i) for i in range(3)]))
            replies.append([session.replies for session in sessions.opened])
        assert training.policy_version == 1 and len(swaps) == 1
        return results, replies

    results, replies = run(body)

    assert [result.policy_version for result in results] == [0, 0]
    assert replies[0] == replies[1]


def test_death_of_the_evaluation_engine_ends_the_evaluation_alone():
    async def body(start):
        async def die(call):
            evaluation.die(ValueError("no memory"))
            await asyncio.Event().wait()

        evaluation = FakeEngine(lambda call: [EIGHT, STOP], before_reply=die)
        sessions = FakeSessions(one_turn)
        training = FakeEngine(lambda call: [EIGHT, STOP])
        actor = start(make_actor(training, sessions, evaluation_engine=lambda _: evaluation))
        with pytest.raises(RuntimeError, match=r"evaluation engine: ValueError\('no memory'\)"):
            await actor.evaluate([task(0), task(1)])
        assert sessions.all_closed and len(evaluation.released) == 2
        actor.submit(assignments(9))
        report = await actor.poll(wait_s=LONG_S)
        assert [group.group_id for group in report.groups] == [9]

    run(body)


def test_programming_error_in_an_evaluation_propagates():
    def make(task):
        return FakeSession("guess", ZeroDivisionError("a bug"))

    async def body(start):
        engine = FakeEngine(lambda call: [EIGHT, STOP])
        actor = make_actor(engine, FakeSessions(make), evaluation_engine=lambda _: engine)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await actor.evaluate([task(0)])

    run(body)


class SlowToClose(FakeSession):
    async def close(self):
        for _ in range(10):
            await asyncio.sleep(0)
        await super().close()


def test_cancelled_evaluation_frees_its_engine_and_environments():
    async def body(start):
        reached = asyncio.Event()

        async def hang():
            reached.set()
            await asyncio.Event().wait()

        evaluation = FakeEngine(lambda call: [EIGHT, STOP])
        sessions = FakeSessions(lambda task: SlowToClose("guess", hang))
        training = FakeEngine(lambda call: [EIGHT, STOP])
        actor = make_actor(training, sessions, evaluation_engine=lambda _: evaluation)
        evaluating = asyncio.create_task(actor.evaluate([task(0), task(1)]))
        await reached.wait()
        evaluating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await evaluating
        assert len(sessions.opened) == 2 and sessions.all_closed
        assert len(evaluation.released) == 2 and not evaluation.running

    run(body)


def test_real_engine_and_environment_fill_whole_groups():
    model = build_tiny_model(hidden_size=16, num_layers=1, num_heads=2)
    engine = EmbeddedEngine(model, max_concurrent=8, context_length=64)

    async def body(start):
        host = EnvironmentHost("number_guess", {"max_guesses": 3}, in_process=True)
        actor = start(make_actor(engine, host, group_size=4))
        actor.submit(assignments(0, 1, 2, 3))
        counts: dict[str, float] = {}
        groups: list[TrajectoryGroup] = []
        while len(groups) < 4:
            report = await actor.poll(wait_s=LONG_S)
            groups += report.groups
            for name, value in report.counts.items():
                counts[name] = counts.get(name, 0) + value
        return groups, counts

    groups, counts = run(body)

    assert sorted(group.group_id for group in groups) == [0, 1, 2, 3]
    assert all(len(group.trajectories) == 4 and not group.failures for group in groups)
    assert counts["generated_tokens"] == sum(group.num_generated_tokens for group in groups)
    for group in groups:
        assert all(t.reward == 1.0 or t.num_turns == 3 for t in group.trajectories)
