"""What an environment is, and how its failure is reported.

An environment follows Gymnasium's shape, with text as observation and action. This loop drives it
(the sum of the rewards is the reward of the episode)::

    environment = Environment(**options)
    observation, info = environment.reset(seed=task.seed, options=dict(task.extras))
    while True:
        reply = ...  # the policy answers the observation
        observation, reward, terminated, truncated, info = environment.step(reply)
        if terminated or truncated:
            break
    environment.close()

A complete environment, played with ``environment.name=my_games:CountUp``::

    class CountUp:
        '''Say the next number, three times.'''

        def __init__(self, *, start: int = 0) -> None:
            self._start = start

        def reset(self, *, seed=None, options=None):
            self._next = self._start + random.Random(seed).randrange(10)
            self._left = 3
            return f"what follows {self._next} ?", {}

        def step(self, action):
            self._next += 1
            self._left -= 1
            right = action.strip() == str(self._next)
            observation = "correct" if right else "failed"
            return observation, float(right), not right or self._left == 0, False, {}
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from skyrl_async.types import DropReason

MAX_DETAIL_CHARS = 500
"""A failure's detail is cut here, so that one episode cannot flood the log."""


class Environment(Protocol):
    """One task, played turn by turn; ``__init__`` takes the options as keyword arguments.

    ``reset`` and ``step`` are either both plain functions, or both ``async def`` (see
    :class:`AsyncEnvironment`). An optional ``close()`` of the same kind frees resources; it is
    called once, also after a failure. Any exception ends this episode and no other.

    The same options, seed and actions must give the same observations: when the process that holds
    the environment is lost, the episode is played again up to where it was. So acquire resources in
    ``reset`` rather than in ``__init__``, and draw random numbers from ``seed`` alone.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of everything random in the episode.
            options: the task's ``extras``.

        Returns:
            The first observation and an info dictionary, which is not read.
        """
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer the policy's reply.

        Args:
            action: text of the reply, without stop token; it may be empty.

        Returns:
            ``(observation, reward, terminated, truncated, info)``. The reward is a finite real
            number (bool and numpy scalars are accepted); ``terminated`` says that the task ended,
            ``truncated`` that a limit of the environment did.
        """
        ...


class AsyncEnvironment(Protocol):
    """As :class:`Environment`, for environments that wait for something: tools, servers, people.

    All its calls run in one asyncio task per episode, on the event loop of the actor. A call that
    misses its deadline is cancelled. Code that blocks instead of awaiting blocks the actor.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> Awaitable[tuple[str, dict[str, Any]]]:
        """As ``Environment.reset``, written as ``async def``."""
        ...

    def step(self, action: str) -> Awaitable[tuple[str, float, bool, bool, dict[str, Any]]]:
        """As ``Environment.step``, written as ``async def``."""
        ...


class EnvironmentFailure(Exception):
    """An episode ended because of its environment; no other episode is concerned.

    Attributes:
        reason: why the trajectory is dropped.
        detail: one line for people, at most ``MAX_DETAIL_CHARS`` characters.
    """

    def __init__(self, reason: DropReason, detail: str) -> None:
        detail = " ".join(detail[: 4 * MAX_DETAIL_CHARS].split())
        if len(detail) > MAX_DETAIL_CHARS:
            detail = detail[: MAX_DETAIL_CHARS - 3] + "..."
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"
