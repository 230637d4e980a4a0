"""The drawn share of episodes takes the given number of times as long, on a clock of the test."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from skyrl_async.lab.stragglers import StragglingSessions
from skyrl_async.types import Task

TASK = Task(task_id="t", environment="e", seed=0, messages=())


@dataclass
class Clock:
    now_s: float = 0.0

    def read(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


@dataclass(frozen=True)
class Answer:
    observation: str = "seen"
    reward: float = 0.5
    terminated: bool = False
    truncated: bool = False


@dataclass
class SlowWorld:
    """Every reset takes one second and every step two."""

    clock: Clock
    closed: int = 0

    async def open(self, task: Task) -> SlowWorld:
        return self

    async def reset(self) -> str:
        self.clock.now_s += 1
        return "start"

    async def step(self, reply: str) -> Answer:
        self.clock.now_s += 2
        return Answer()

    async def close(self) -> None:
        self.closed += 1


def episode_seconds(*, fraction: float, factor: float, generation_s: float = 3.0) -> float:
    clock = Clock()
    world = SlowWorld(clock)
    sessions = StragglingSessions(
        world, fraction=fraction, factor=factor, seed=0, clock=clock.read, sleep=clock.sleep
    )

    async def play() -> None:
        session = await sessions.open(TASK)
        assert await session.reset() == "start"
        for _ in range(2):
            clock.now_s += generation_s
            assert await session.step("reply") == Answer()
        await session.close()

    asyncio.run(play())
    assert world.closed == 1
    return clock.now_s


def test_a_slowed_episode_takes_factor_times_as_long():
    plain_s = 1 + 2 * (3 + 2)
    assert episode_seconds(fraction=0.0, factor=5.0) == plain_s
    assert episode_seconds(fraction=1.0, factor=5.0) == 5 * plain_s


def slowed(*, seed: int, count: int = 2000) -> list[bool]:
    """Return which of the episodes opened one after the other were slowed."""
    clock = Clock()
    sessions = StragglingSessions(
        SlowWorld(clock), fraction=0.2, factor=3, seed=seed, clock=clock.read, sleep=clock.sleep
    )

    async def play() -> list[bool]:
        out = []
        for _ in range(count):
            session = await sessions.open(TASK)
            before_s = clock.now_s
            await session.reset()
            out.append(clock.now_s - before_s > 1)
        return out

    return asyncio.run(play())


def test_the_share_is_as_given_and_the_draw_repeatable():
    first = slowed(seed=1)
    assert sum(first) / len(first) == pytest.approx(0.2, abs=0.04)
    assert slowed(seed=1) == first
    assert slowed(seed=2) != first


@pytest.mark.parametrize(("fraction", "factor"), [(-0.1, 2), (1.1, 2), (0.5, 0.9)])
def test_values_out_of_range_are_refused(fraction: float, factor: float):
    with pytest.raises(ValueError, match=r"fraction must be in 0\.\.1 and factor >= 1"):
        StragglingSessions(SlowWorld(Clock()), fraction=fraction, factor=factor, seed=0)
