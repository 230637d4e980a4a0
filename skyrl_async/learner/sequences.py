"""Groups to sequences: loss masks at the cut-off, and advantages spread over the sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from skyrl_async.algorithms.reward_shaping import overlong_penalty
from skyrl_async.types import SampledGroup, TrainSequence, Trajectory, TrajectoryStatus

AdvantageEstimator = Callable[[NDArray[np.floating], NDArray[np.integer]], NDArray[np.floating]]
"""From rewards ``[N]`` and group ids ``[N]`` of a batch to one value per trajectory ``[N]``."""


def make_sequences(
    groups: Sequence[SampledGroup],
    *,
    advantage: AdvantageEstimator,
    overlong_buffer_tokens: int = 0,
    max_tokens: int = 0,
) -> list[TrainSequence]:
    """Return one sequence for every trajectory that has a token in the loss.

    A token is in the loss if the policy sampled it with a version of at least the group's cut-off.
    The advantages are computed over *all* members of the group, masked ones included: their rewards
    were earned on the same task, and a baseline needs them.

    Args:
        groups: leased for this step.
        advantage: estimator over the whole batch.
        overlong_buffer_tokens: band below ``max_tokens`` in which rewards fall; 0 for none.
        max_tokens: of a trajectory, for that band.
    """
    members = [(sampled, t) for sampled in groups for t in sampled.trajectories]
    rewards = np.array([t.reward for _, t in members])
    if overlong_buffer_tokens:
        lengths = np.array([len(t.token_ids) for _, t in members])
        rewards = rewards + overlong_penalty(
            lengths, max_length=max_tokens, buffer=overlong_buffer_tokens
        )
    group_ids = np.array([sampled.group.group_id for sampled, _ in members])
    sequences = []
    credits = advantage(rewards, group_ids)
    for (sampled, t), value, reward in zip(members, credits, rewards, strict=True):
        mask = _loss_mask(t, cutoff=sampled.min_trainable_version)
        if mask is None:
            continue
        sequences.append(
            TrainSequence(
                token_ids=t.token_ids,
                loss_mask=mask,
                behavior_logprobs=t.behavior_logprobs,
                policy_versions=t.policy_versions,
                temperature=t.temperature,
                advantages=mask * np.float32(value),
                reward=float(reward),
                group_id=sampled.group.group_id,
                truncated=t.status is TrajectoryStatus.TRUNCATED,
            )
        )
    return sequences


def _loss_mask(trajectory: Trajectory, *, cutoff: int) -> NDArray[np.bool_] | None:
    """Return which tokens are in the loss; None if none is."""
    if trajectory.max_policy_version < cutoff:
        return None
    mask = trajectory.sampled
    if trajectory.min_policy_version < cutoff:
        mask = mask & (trajectory.policy_versions >= cutoff)
    return mask
