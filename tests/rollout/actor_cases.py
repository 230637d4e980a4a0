"""Actors on fake or real engines, and a deadline for what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
from skyrl_async.rollout.actor import RolloutActor, RolloutSettings
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.episode import EpisodeLimits
from skyrl_async.types import (
    Assignment,
    Sampling,
    Task,
)
from tests.fakes import FakeClock
from tests.rollout.test_chat import encode
from tests.rollout_fakes import FakeSession, outcome

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
