"""Sessions of synchronous environments that live in the actor's own process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from skyrl_async.environments.outcomes import (
    StepOutcome,
    checked_reset,
    checked_step,
    described_error,
    failure_of,
)
from skyrl_async.types import Task

logger = logging.getLogger(__name__)


class InProcessSession:
    """Calls the environment directly: no thread, no deadline, the least cost.

    Its methods never suspend. An environment that blocks blocks the actor, and one that ends the
    process ends the actor; whatever it raises, ``SystemExit`` included, ends its episode alone.
    ``KeyboardInterrupt`` passes: it cannot be told from Ctrl-C.

    Args:
        make: makes the environment.
        task: what it plays.
        max_observation_chars: a longer observation fails the episode.
    """

    __slots__ = ("_environment", "_make", "_max_observation_chars", "_task")

    def __init__(self, make: Callable[[], Any], task: Task, *, max_observation_chars: int) -> None:
        self._make = make
        self._task = task
        self._max_observation_chars = max_observation_chars
        self._environment: Any = None

    async def reset(self) -> str:
        """Make the environment and return its first observation.

        Raises:
            EnvironmentFailure: if it fails.
            RuntimeError: if this was called before.
        """
        if self._environment is not None:
            raise RuntimeError("a session plays one episode; open another")
        task = self._task
        doing = "__init__"
        try:
            self._environment = self._make()
            doing = "reset"
            value = self._environment.reset(seed=task.seed, options=dict(task.extras))
            return checked_reset(value, max_observation_chars=self._max_observation_chars)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise failure_of(error, doing=doing, task_id=task.task_id) from error

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply.

        Raises:
            EnvironmentFailure: if the environment fails.
            RuntimeError: before :meth:`reset` or after :meth:`close`.
        """
        environment = self._environment
        if environment is None:
            raise RuntimeError("the session is not open: call reset first")
        try:
            value = environment.step(reply)
            return checked_step(value, max_observation_chars=self._max_observation_chars)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise failure_of(error, doing="step", task_id=self._task.task_id) from error

    async def close(self) -> None:
        """Close the environment; what it raises is logged."""
        environment, self._environment = self._environment, None
        close = getattr(environment, "close", None)
        if close is None:
            return
        try:
            close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            logger.warning("%s: %s", self._task.task_id, described_error(error, doing="close"))
