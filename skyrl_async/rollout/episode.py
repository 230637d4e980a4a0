"""One episode: an environment and an engine take turns until one of them ends it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.engine_client import EngineClient
from skyrl_async.rollout.slots import NULL_SLOT, EpisodeClock
from skyrl_async.types import (
    DropReason,
    FinishReason,
    Sampling,
    Task,
    Trajectory,
    TrajectoryStatus,
    Turn,
)


class StepOutcome(Protocol):
    """What an environment answered."""

    @property
    def observation(self) -> str:
        """What the policy sees next."""
        ...

    @property
    def reward(self) -> float:
        """Of this step."""
        ...

    @property
    def terminated(self) -> bool:
        """Whether the task ended."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether a limit of the environment ended it."""
        ...


class Session(Protocol):
    """One running environment."""

    async def reset(self) -> str:
        """Return the first observation."""
        ...

    async def step(self, reply: str) -> StepOutcome:
        """Answer a reply."""
        ...

    async def close(self) -> None:
        """Free its resources."""
        ...


class Sessions(Protocol):
    """Opens environments; see :class:`skyrl_async.environments.host.EnvironmentHost`."""

    async def open(self, task: Task) -> Session:
        """Make the environment of ``task``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """When an episode ends by itself.

    Attributes:
        max_turns: replies; then the trajectory is truncated.
        context_length: tokens of prompt and replies together; then it is truncated.
        timeout_s: of the whole episode; then it fails with ``episode_timeout``.
    """

    max_turns: int
    context_length: int
    timeout_s: float


async def play(
    task: Task,
    *,
    episode_id: str,
    sessions: Sessions,
    engine: EngineClient,
    chat: Chat,
    sampling: Sampling,
    limits: EpisodeLimits,
    clock: EpisodeClock = NULL_SLOT,
) -> Trajectory:
    """Play ``task`` once.

    Args:
        task: what to play.
        episode_id: unique among the live episodes of the engine.
        sessions: opens the environment.
        engine: generates the replies.
        chat: tokens of observations, text of replies.
        sampling: of each reply.
        limits: of the episode.
        clock: told what the episode does.

    Raises:
        EnvironmentFailure: if the environment fails, or the episode takes too long.
    """
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            clock.in_environment()
            session = await sessions.open(task)
            try:
                return await _take_turns(
                    task, episode_id, session, engine, chat, sampling, limits, clock
                )
            finally:
                clock.in_environment()
                engine.release(episode_id)
                await session.close()
    except TimeoutError:
        if not deadline.expired():
            raise
        raise EnvironmentFailure(
            DropReason.EPISODE_TIMEOUT,
            f"{task.task_id}: the episode took longer than {limits.timeout_s} s",
        ) from None


async def _take_turns(
    task: Task,
    episode_id: str,
    session: Session,
    engine: EngineClient,
    chat: Chat,
    sampling: Sampling,
    limits: EpisodeLimits,
    clock: EpisodeClock,
) -> Trajectory:
    turns: list[Turn] = []
    reward = 0.0
    first = await session.reset()
    clock.works()
    observed = chat.prompt(task.messages, first)
    context: list[int] = []
    while True:
        context += observed
        room = limits.context_length - len(context)
        if room < 1:
            if not turns:
                raise EnvironmentFailure(
                    DropReason.OVERLONG_OBSERVATION,
                    f"{task.task_id}: the prompt has {len(context)} tokens, the context "
                    f"{limits.context_length}; raise engine.context_length",
                )
            return Trajectory.from_turns(turns, reward=reward, status=TrajectoryStatus.TRUNCATED)
        request = sampling if room >= sampling.max_tokens else replace(sampling, max_tokens=room)
        clock.generates()
        generation = await engine.generate(
            context, request, request_id=f"{episode_id}/{len(turns)}", session_id=episode_id
        )
        token_ids = generation.token_ids.tolist()
        clock.generated(len(token_ids), queued_s=generation.queued_s)
        ids = np.array(observed, np.int32)
        turns.append(Turn(observation_token_ids=ids, generation=generation))
        context += token_ids
        outcome = await session.step(chat.decode(token_ids))
        clock.works()
        reward += outcome.reward
        if outcome.terminated:
            return Trajectory.from_turns(turns, reward=reward, status=TrajectoryStatus.TERMINATED)
        if outcome.truncated or len(turns) >= limits.max_turns:
            return Trajectory.from_turns(turns, reward=reward, status=TrajectoryStatus.TRUNCATED)
        stopped = generation.finish_reason is FinishReason.STOP
        observed = chat.observation(outcome.observation, stopped=stopped)
