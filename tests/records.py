"""Records for tests, made through the same checks as real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl_async.types import (
    FinishReason,
    Generation,
    SampledBatch,
    SampledGroup,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Turn,
)


def make_turn(
    observation: Sequence[int],
    reply: Sequence[int],
    *,
    version: int | Sequence[int] = 0,
    logprob: float | Sequence[float] = -1.0,
    temperature: float = 1.0,
) -> Turn:
    versions = [version] * len(reply) if isinstance(version, int) else version
    logprobs = [logprob] * len(reply) if isinstance(logprob, float) else logprob
    return Turn(
        observation_token_ids=np.array(observation, np.int32),
        generation=Generation(
            token_ids=np.array(reply, np.int32),
            logprobs=np.array(logprobs, np.float32),
            policy_versions=np.array(versions, np.int32),
            temperature=temperature,
            finish_reason=FinishReason.STOP,
        ),
    )


def make_trajectory(
    *turns: Turn, reward: float = 1.0, status: TrajectoryStatus = TrajectoryStatus.TERMINATED
) -> Trajectory:
    return Trajectory.from_turns(turns, reward=reward, status=status)


def random_trajectory(
    rng: np.random.Generator, *, version: int, vocab_size: int = 58, max_turns: int = 4
) -> Trajectory:
    turns = []
    for _ in range(rng.integers(1, max_turns + 1)):
        length = int(rng.integers(1, 4))
        turns.append(
            make_turn(
                rng.integers(0, vocab_size, rng.integers(1, 6)).tolist(),
                rng.integers(0, vocab_size, length).tolist(),
                version=version,
                logprob=(-rng.uniform(3.5, 4.5, length)).tolist(),
            )
        )
    return make_trajectory(*turns, reward=float(rng.integers(0, 2)))


def random_batch(
    seed: int,
    *,
    train_version: int,
    num_groups: int = 4,
    group_size: int = 4,
    max_staleness: int = 2,
    vocab_size: int = 58,
) -> SampledBatch:
    rng = np.random.default_rng(seed)
    oldest = max(0, train_version - max_staleness)
    groups = []
    for group_id in range(num_groups):
        members = tuple(
            random_trajectory(
                rng,
                version=int(rng.integers(oldest, train_version + 1)),
                vocab_size=vocab_size,
            )
            for _ in range(group_size)
        )
        group = TrajectoryGroup(group_id=group_id, task_id=f"t/{group_id}", trajectories=members)
        cutoff = train_version - max_staleness
        groups.append(SampledGroup(group=group, min_trainable_version=cutoff))
    return SampledBatch(lease_id=0, train_version=train_version, groups=tuple(groups))
