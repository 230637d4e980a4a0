"""A token without a behavior logprob is to a learner step as one that is too old for the loss."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import SampledBatch, Trajectory
from tests.records import random_batch

VERSION, CUTOFF = 0, 0
ALGORITHMS = {
    "plain": AlgorithmSettings(),
    "sequence weight": AlgorithmSettings(
        correction=CorrectionSettings(weight="sequence"), aggregation="sequence_mean"
    ),
    "masks": AlgorithmSettings(
        correction=CorrectionSettings(geometric_mask=(0.01, 100.0), normalize_weights=True)
    ),
    "interpolated": AlgorithmSettings(proximal="interpolated"),
    "off-policy baseline": AlgorithmSettings(
        advantage="optimal_off_policy_baseline", correction=CorrectionSettings(weight="sequence")
    ),
    "whitened": AlgorithmSettings(whiten_advantages=True),
}


def with_first_tokens(batch: SampledBatch, **values: Any) -> SampledBatch:
    """Return the batch with these entries at the first sampled token of every other trajectory."""

    def changed(trajectory: Trajectory) -> Trajectory:
        place = int(np.flatnonzero(trajectory.sampled)[0])
        arrays = {name: getattr(trajectory, name).copy() for name in values}
        for name, value in values.items():
            arrays[name][place] = value
        return replace(trajectory, **arrays)

    groups = []
    for sampled in batch.groups:
        members = [
            changed(t) if number % 2 else t for number, t in enumerate(sampled.group.trajectories)
        ]
        group = replace(sampled.group, trajectories=tuple(members))
        groups.append(replace(sampled, group=group, min_trainable_version=CUTOFF))
    return replace(batch, groups=tuple(groups))


def step(algorithm: AlgorithmSettings, batch: SampledBatch):
    """Return the gradient of one step, and what it reports."""
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2).double(),
        LearnerSettings(
            algorithm=algorithm,
            num_minibatches=1,
            optimizer=OptimizerSettings(max_grad_norm=1e9),
        ),
    )
    gradients: list[torch.Tensor] = []
    optimize = learner.trainer.optimizer.step

    def capture() -> None:
        gradients.extend(p.grad.clone() for p in learner.trainer.parameters)
        optimize()

    learner.trainer.optimizer.step = capture
    result = learner.step(batch)
    assert not result.skipped
    return gradients, result.metrics


@pytest.mark.parametrize("invalid", [math.nan, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_leaves_loss_gradient_and_denominators(name, invalid):
    batch = random_batch(3, train_version=VERSION)
    algorithm = ALGORITHMS[name]
    gradients, metrics = step(algorithm, with_first_tokens(batch, behavior_logprobs=invalid))
    without, expected = step(algorithm, with_first_tokens(batch, policy_versions=-1))
    for gradient, other in zip(gradients, without, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)
    assert metrics["loss/policy"] == pytest.approx(expected["loss/policy"], abs=1e-9)
    assert metrics["learner/loss_tokens"] == expected["learner/loss_tokens"]
    assert metrics["offpolicy/masked_fraction"] > 0 == expected["offpolicy/masked_fraction"]
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("advantage", ["gae", "vtrace", "retrace", "turn_level_gae"])
def test_with_a_critic_the_step_stays_finite(advantage):
    algorithm = AlgorithmSettings(advantage=advantage, critic=CriticSettings())
    batch = with_first_tokens(random_batch(3, train_version=VERSION), behavior_logprobs=math.nan)
    gradients, metrics = step(algorithm, batch)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(math.isfinite(value) for value in metrics.values())
