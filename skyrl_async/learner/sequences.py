"""Groups to sequences: loss masks at the cut-off, and advantages spread over the sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from skyrl_async.types import SampledGroup, TrainSequence

AdvantageEstimator = Callable[[NDArray[np.floating]], NDArray[np.float64]]


def make_sequences(
    groups: Sequence[SampledGroup], *, advantage: AdvantageEstimator
) -> list[TrainSequence]:
    """Return one sequence for every trajectory that has a token in the loss.

    A token is in the loss if the policy sampled it with a version of at least the group's cut-off.
    The advantages are computed over *all* members of the group, masked ones included: their rewards
    were earned on the same task, and a baseline needs them.

    Args:
        groups: leased for this step.
        advantage: from the rewards ``[G]`` of one group to one value per trajectory ``[G]``.
    """
    sequences = []
    for sampled in groups:
        members = sampled.group.trajectories
        rewards = np.array([t.reward for t in members])
        for trajectory, value in zip(members, advantage(rewards), strict=True):
            cutoff = sampled.min_trainable_version
            if trajectory.max_policy_version < cutoff:
                continue
            mask = trajectory.sampled
            if trajectory.min_policy_version < cutoff:
                mask = mask & (trajectory.policy_versions >= cutoff)
            sequences.append(
                TrainSequence(
                    token_ids=trajectory.token_ids,
                    loss_mask=mask,
                    behavior_logprobs=trajectory.behavior_logprobs,
                    policy_versions=trajectory.policy_versions,
                    temperature=trajectory.temperature,
                    advantages=mask * np.float32(value),
                )
            )
    return sequences
