"""Episodes that take longer than others, on purpose."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from skyrl_async.rollout.episode import Session, Sessions, StepOutcome
from skyrl_async.types import Task


class StragglingSessions:
    """Slows a random share of the episodes that are opened, evaluations included.

    A slowed episode takes ``factor`` times as long in each turn, generation and environment
    together: after the environment has answered it waits for the time that is missing.

    Args:
        sessions: opens the environments.
        fraction: probability that an episode is slowed.
        factor: how many times as long a slowed one takes.
        seed: of the draws; the n-th episode opened has the n-th draw.
        clock: seconds, monotonic.
        sleep: waits for seconds.

    Raises:
        ValueError: if ``fraction`` is not in 0..1 or ``factor`` is below 1.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        fraction: float,
        factor: float,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not 0 <= fraction <= 1 or factor < 1:
            raise ValueError(
                f"fraction must be in 0..1 and factor >= 1, got {fraction} and {factor}"
            )
        self._sessions = sessions
        self._fraction = fraction
        self._factor = factor
        self._random = random.Random(seed)
        self._clock = clock
        self._sleep = sleep

    async def open(self, task: Task) -> Session:
        """Make the environment of ``task``, perhaps a slowed one."""
        slowed = self._random.random() < self._fraction
        session = await self._sessions.open(task)
        if not slowed:
            return session
        return _SlowSession(session, factor=self._factor, clock=self._clock, sleep=self._sleep)


class _SlowSession:
    def __init__(
        self,
        session: Session,
        *,
        factor: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._session = session
        self._extra = factor - 1
        self._clock = clock
        self._sleep = sleep
        self._since_s = clock()

    async def reset(self) -> str:
        observation = await self._session.reset()
        await self._lag()
        return observation

    async def step(self, reply: str) -> StepOutcome:
        outcome = await self._session.step(reply)
        await self._lag()
        return outcome

    async def close(self) -> None:
        await self._session.close()

    async def _lag(self) -> None:
        """Wait ``factor - 1`` times as long as the turn took, then begin the next one."""
        await self._sleep(self._extra * (self._clock() - self._since_s))
        self._since_s = self._clock()
