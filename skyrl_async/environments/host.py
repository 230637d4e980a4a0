"""Where environments live: each episode fails alone, whatever its environment does."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Protocol

from skyrl_async.environments.async_session import AsyncSession, end_all
from skyrl_async.environments.in_process import InProcessSession
from skyrl_async.environments.outcomes import StepOutcome
from skyrl_async.environments.registry import EnvironmentType, find_environment
from skyrl_async.environments.worker_pool import WorkerPool, WorkerSession
from skyrl_async.types import Task


class EnvironmentSession(Protocol):
    """One episode of one environment; one call at a time."""

    async def reset(self) -> str:
        """Make the environment and return its first observation."""
        ...

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply."""
        ...

    async def close(self) -> None:
        """Close the environment; never raises, does not wait for a subprocess or a coroutine."""
        ...


class EnvironmentHost:
    """Opens sessions of one environment. All calls belong to one event loop.

    ::

        host = EnvironmentHost("number_guess", {"high": 15}, in_process=True)
        session = await host.open(task)
        try:
            observation = await session.reset()
            outcome = await session.step("8")
        finally:
            await session.close()
        await host.close()

    ``reset`` and ``step`` raise :class:`skyrl_async.environments.base.EnvironmentFailure`, and the
    episode is over, when the environment

    * raises anything, ends its process, or returns something of another shape
      (``environment_error``),
    * takes longer than ``step_timeout_s`` for one call (``step_timeout``),
    * returns a reward that is not a finite real number (``nonfinite_reward``; bool and numpy
      scalars are numbers),
    * returns an observation longer than ``max_observation_chars`` (``overlong_observation``).

    Lone surrogates in an observation are replaced by U+FFFD, as no tokenizer can encode them.

    Three ways to run, the first two for synchronous environments:

    * **Subprocesses** (``in_process=False``). A few killable processes, each of which plays many
      episodes, one call at a time. An episode stays in its process. When one hangs or ends the
      process, the others that lived there lose nothing: at its next call, each is made again in
      another process, by repeating its calls with the same seed; if an answer then differs, the
      environment is not reproducible and the episode fails (``environment_error``). Until a hanging
      call is killed, the episodes of its process wait for it; those of other processes go on.
      Options and ``extras`` travel as JSON, so tuples arrive as lists. Standard output of an
      environment goes to standard error.
    * **In process** (``in_process=True``). Direct calls, no thread, no deadline: the fastest, but
      an environment can block or end the actor.
    * **Asynchronous** environments always run on the event loop of the actor, one task per episode.
      A call that misses its deadline is cancelled, and abandoned if it swallows that; code that
      blocks without awaiting blocks the actor.

    Args:
        name: of the environment, as :func:`skyrl_async.environments.registry.find_environment`.
        options: keyword arguments of the environment.
        in_process: run a synchronous environment in this process.
        num_processes: subprocesses; they start when the first session opens.
        step_timeout_s: deadline of one call, from when the environment's process comes to it.
        max_observation_chars: a longer observation fails the episode.
        startup_timeout_s: deadline of a subprocess until it can play.

    Raises:
        ValueError: if there is no such environment, or it cannot run in a subprocess.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        in_process: bool = False,
        num_processes: int = 2,
        step_timeout_s: float = 30.0,
        max_observation_chars: int = 20_000,
        startup_timeout_s: float = 60.0,
    ) -> None:
        kind = find_environment(name)
        chosen = {**kind.default_options, **(options or {})}
        self._name = name
        self._make = functools.partial(kind.environment_class, **chosen)
        self._is_async = kind.is_async
        self._step_timeout_s = step_timeout_s
        self._max_observation_chars = max_observation_chars
        self._running: set[AsyncSession] = set()
        self._pool: WorkerPool | None = None
        self._closed = False
        if not (kind.is_async or in_process):
            self._pool = WorkerPool(
                _hello(kind, chosen, max_observation_chars),
                num_processes=num_processes,
                step_timeout_s=step_timeout_s,
                startup_timeout_s=startup_timeout_s,
            )

    async def open(self, task: Task) -> EnvironmentSession:
        """Return a session that plays ``task``; the environment is made by its ``reset``.

        Raises:
            EnvironmentFailure: if no subprocess can be started.
            RuntimeError: if the host is closed.
            ValueError: if the task is for another environment.
        """
        if self._closed:
            raise RuntimeError("the environment host is closed")
        if task.environment != self._name:
            raise ValueError(
                f"{task.task_id} is for environment {task.environment!r}, this host plays "
                f"{self._name!r}"
            )
        if self._pool is not None:
            self._pool.start()
            return WorkerSession(self._pool, task)
        if self._is_async:
            return AsyncSession(
                self._make,
                task,
                step_timeout_s=self._step_timeout_s,
                max_observation_chars=self._max_observation_chars,
                running=self._running,
            )
        return InProcessSession(self._make, task, max_observation_chars=self._max_observation_chars)

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """End all sessions; neither process nor task of an environment remains.

        Args:
            timeout_s: for environments to finish their calls and to close, before they are killed
                or cancelled.
        """
        self._closed = True
        if self._pool is not None:
            await self._pool.close(timeout_s=timeout_s)
        await end_all(self._running, timeout_s=timeout_s)


def _hello(
    kind: EnvironmentType, options: Mapping[str, Any], max_observation_chars: int
) -> dict[str, Any]:
    """Return the first message to a subprocess.

    Raises:
        ValueError: if the class or an option cannot travel to it.
    """
    module, qualified_name = kind.environment_class.__module__, kind.environment_class.__qualname__
    if module == "__main__" or "<locals>" in qualified_name:
        raise ValueError(
            f"environment {kind.name!r}: a subprocess cannot import {module}.{qualified_name}; "
            "define it at the top of a module, or set environment.in_process=true"
        )
    for option, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"environment {kind.name!r}: option {option!r} cannot travel to a subprocess as "
                f"JSON ({error}); use plain values, or set environment.in_process=true"
            ) from None
    return {
        "entry_point": f"{module}:{qualified_name}",
        "options": dict(options),
        "max_observation_chars": max_observation_chars,
    }
