"""A learner step with a teacher, against the gradient of formulas over single sequences."""

import copy
import math

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.algorithms.distillation import DistillationSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.records import random_batch


def model(seed: int):
    return build_tiny_model(hidden_size=16, num_heads=2, seed=seed).double()


def logprobs_of(policy, trajectory) -> torch.Tensor:
    """Return the logprobs of the sampled tokens."""
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
    logprobs = policy(input_ids=ids[None]).logits[0].log_softmax(-1)
    return torch.stack([logprobs[t - 1, ids[t]] for t in np.flatnonzero(trajectory.sampled)])


@pytest.mark.parametrize(("reward_weight", "coefficient"), [(0.0, 1.0), (0.7, 0.3)])
def test_the_gradient_of_a_step_is_the_literal_one(reward_weight, coefficient):
    student, teacher = model(0), model(1)
    plain = copy.deepcopy(student)
    distillation = DistillationSettings(
        coefficient=coefficient, reward_weight=reward_weight, max_log_ratio=1.0
    )
    learner = Learner(
        student,
        LearnerSettings(
            algorithm=AlgorithmSettings(
                entropy_coefficient=0.0,
                correction=CorrectionSettings(weight_cap=1.5),
                distillation=distillation,
            ),
            optimizer=OptimizerSettings(max_grad_norm=1e9),
            num_minibatches=1,
        ),
        teacher=teacher,
    )
    batch = random_batch(4, train_version=0, num_groups=2, group_size=3)
    terms, divergence = [], []
    for sampled in batch.groups:
        rewards = np.array([t.reward for t in sampled.group.trajectories])
        credits = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for trajectory, credit in zip(sampled.group.trajectories, credits, strict=True):
            current = logprobs_of(plain, trajectory)
            with torch.no_grad():
                taught = logprobs_of(teacher, trajectory)
            behavior = trajectory.behavior_logprobs[trajectory.sampled]
            for own, other, before in zip(current, taught, behavior, strict=True):
                log_ratio = other.item() - own.item()
                divergence.append(-log_ratio)
                limited = max(-1.0, min(1.0, log_ratio))
                advantage = reward_weight * credit + coefficient * limited
                weight = min(math.exp(own.item() - before), 1.5)
                terms.append(-weight * advantage * own)
    (torch.stack(terms).sum() / len(terms)).backward()
    assert max(map(abs, divergence)) > 1

    captured = {}
    step = learner.trainer.optimizer.step

    def capture() -> None:
        captured.update({n: p.grad.clone() for n, p in learner.model.named_parameters()})
        step()

    learner.trainer.optimizer.step = capture
    teacher_before = copy.deepcopy(teacher.state_dict())
    result = learner.step(batch)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-7)
    expected = sum(divergence) / len(divergence)
    assert result.metrics["distillation/reverse_kl"] == pytest.approx(expected, rel=1e-9)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, teacher_before[name])


def test_a_distillation_needs_a_teacher():
    algorithm = AlgorithmSettings(distillation=DistillationSettings())
    with pytest.raises(ValueError, match="needs a teacher"):
        Learner(model(0), LearnerSettings(algorithm=algorithm))
    with pytest.raises(ValueError, match="interpolated"):
        AlgorithmSettings(distillation=DistillationSettings(), proximal="interpolated")
