"""The reward of a long trajectory falls before anything is computed from it."""

from functools import partial

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import SampledBatch, SampledGroup, TrajectoryGroup
from tests.records import make_trajectory, make_turn

LIMIT, BUFFER = 10, 4
LENGTHS = [4, 6, 7, 9, 10, 13]
REWARDS = [0.5, 1.0, 0.0, 1.0, 1.0, 0.25]
PENALIZED = [0.5, 1.0, 0.0 - 0.25, 1.0 - 0.75, 1.0 - 1.0, 0.25 - 1.0]


def batch() -> SampledBatch:
    """Return one group with trajectories of these lengths."""
    members = tuple(
        make_trajectory(make_turn([1, 2], [3 + n] * (length - 2)), reward=reward)
        for n, (length, reward) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    )
    assert [len(t.token_ids) for t in members] == LENGTHS
    group = TrajectoryGroup(group_id=0, task_id="t/0", trajectories=members)
    sampled = SampledGroup(group=group, min_trainable_version=0)
    return SampledBatch(lease_id=0, train_version=0, groups=(sampled,))


def test_rewards_fall_over_the_buffer_below_the_limit_and_advantages_are_of_those():
    sequences = make_sequences(
        batch().groups,
        advantage=partial(estimate, "mean_centered"),
        overlong_buffer_tokens=BUFFER,
        max_tokens=LIMIT,
    )
    assert [s.reward for s in sequences] == pytest.approx(PENALIZED)
    mean = sum(PENALIZED) / len(PENALIZED)
    for sequence, reward in zip(sequences, PENALIZED, strict=True):
        advantages = sequence.advantages[sequence.loss_mask]
        assert advantages == pytest.approx(reward - mean, abs=1e-6)


def test_without_a_buffer_rewards_are_those_of_the_environment():
    sequences = make_sequences(
        batch().groups, advantage=partial(estimate, "mean_centered"), max_tokens=LIMIT
    )
    assert [s.reward for s in sequences] == REWARDS


@pytest.mark.parametrize("advantage", ["mean_centered", "gae"])
def test_policy_and_critic_of_a_step_learn_from_the_lowered_rewards(advantage):
    critic = CriticSettings() if advantage == "gae" else None
    algorithm = AlgorithmSettings(
        advantage=advantage, critic=critic, overlong_buffer_tokens=BUFFER, max_tokens=LIMIT
    )
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2),
        LearnerSettings(algorithm=algorithm, num_minibatches=1),
    )
    seen = []
    learner.observer = seen.extend
    assert not learner.step(batch()).skipped
    (minibatch,) = seen
    by_length = dict(zip(LENGTHS, PENALIZED, strict=True))
    mean = sum(PENALIZED) / len(PENALIZED)
    for number, sequence in enumerate(minibatch.sequences):
        own = minibatch.tokens.sequence_ids == number
        reward, count = by_length[len(sequence.token_ids)], int(own.sum())
        if critic is None:
            expected = [reward - mean] * count
        else:
            # All values are 0 as yet, so an advantage is what is left of the reward.
            expected = [reward * 0.95**k for k in reversed(range(count))]
            drawn_to = minibatch.targets.values.targets[own]
            torch.testing.assert_close(drawn_to, torch.tensor(expected), rtol=0, atol=1e-6)
        advantages = minibatch.targets.advantages[own].numpy()
        np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-6)
