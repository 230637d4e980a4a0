from __future__ import annotations

import asyncio
import copy

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import (
    DropReason,
)
from tests.rollout.actor_cases import (
    EIGHT,
    FIVE,
    LONG_S,
    STOP,
    assignments,
    make_actor,
    one_turn,
    run,
    task,
)
from tests.rollout.embedded_engine_cases import roughened, weights_of
from tests.rollout_fakes import FakeEngine, FakeSession, FakeSessions, outcome


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
