"""Which version the proximal logprobs of a learner step are of, exact and interpolated."""

import copy
import math
from typing import Literal

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.logprobs import token_logprobs
from skyrl_async.learner.minibatches import Minibatch
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.records import random_batch

VERSION, LOW, HIGH, CAP = 3, 0.1, 0.15, 1.2


def new_learner(algorithm: AlgorithmSettings, **settings: int) -> Learner:
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2).double(),
        LearnerSettings(
            algorithm=algorithm,
            optimizer=OptimizerSettings(learning_rate=0.02, max_grad_norm=1e9),
            **settings,
        ),
    )
    learner.policy_version = VERSION
    return learner


@pytest.mark.parametrize(
    "correction", [CorrectionSettings(), CorrectionSettings(veto_below=1e-9)], ids=["first", "all"]
)
def test_exact_ones_are_of_the_start_of_the_step_in_every_minibatch_and_epoch(correction):
    learner = new_learner(AlgorithmSettings(correction=correction), num_minibatches=3, num_epochs=2)
    start = copy.deepcopy(learner.model)
    seen: list[Minibatch] = []
    learner.observer = seen.extend
    learner.step(random_batch(4, train_version=VERSION))
    assert len(seen) == 3
    moved = 0.0
    for minibatch in seen:
        assert minibatch.proximal_logprobs is not None
        for recorded, microbatch in zip(
            minibatch.proximal_logprobs, minibatch.microbatches, strict=True
        ):
            with torch.no_grad():
                expected = token_logprobs(start, microbatch)
                now = token_logprobs(learner.model, microbatch)
            torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-12)
            moved = max(moved, (now - expected).abs().max().item())
    assert moved > 0.1


def literal_loss(model: torch.nn.Module, batch) -> torch.Tensor:
    """Return decoupled PPO with the proximal logprob of a token k versions back at 1 - 1/k."""
    terms = []
    for sampled in batch.groups:
        members = sampled.group.trajectories
        rewards = np.array([t.reward for t in members])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for trajectory, advantage in zip(members, advantages, strict=True):
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for t in np.flatnonzero(trajectory.sampled):
                current, behavior = logprobs[t - 1, ids[t]], float(trajectory.behavior_logprobs[t])
                # The pass belongs to the version that the step will make.
                k = VERSION + 1 - int(trajectory.policy_versions[t])
                proximal = behavior / k + (1 - 1 / k) * current.item()
                weight = min(math.exp(proximal - behavior), CAP)
                ratio = (current - proximal).exp()
                bounded = ratio.clamp(1 - LOW, 1 + HIGH)
                terms.append(-weight * torch.minimum(ratio * advantage, bounded * advantage))
    return torch.stack(terms).mean()


def test_interpolated_ones_lie_between_behavior_and_current_policy_by_the_age_of_each_token():
    algorithm = AlgorithmSettings(
        proximal="interpolated",
        entropy_coefficient=0.0,
        correction=CorrectionSettings(weight_cap=CAP),
        loss_options={"clip_low": LOW, "clip_high": HIGH},
    )
    learner = new_learner(algorithm, num_minibatches=1)
    batch = random_batch(5, train_version=VERSION, max_staleness=VERSION)
    ages = {t.min_policy_version for g in batch.groups for t in g.trajectories}
    assert len(ages) > 2
    reference = copy.deepcopy(learner.model)
    literal_loss(reference, batch).backward()
    captured: dict[str, torch.Tensor] = {}
    step = learner.trainer.optimizer.step

    def capture() -> None:
        captured.update({n: p.grad.clone() for n, p in learner.model.named_parameters()})
        step()

    learner.trainer.optimizer.step = capture
    result = learner.step(batch)
    assert 0 < result.metrics["offpolicy/clip_fraction"] < 1
    for name, parameter in reference.named_parameters():
        # The sequences carry their advantages in float32.
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_mismatch_is_seen_whatever_the_proximal_policy_is():
    """With interpolated ones, by the tokens whose weights are still those of the start."""
    batch = random_batch(4, train_version=VERSION, max_staleness=0)

    def mismatch(proximal: Literal["recomputed", "interpolated"], num_minibatches: int) -> float:
        learner = new_learner(AlgorithmSettings(proximal=proximal), num_minibatches=num_minibatches)
        return learner.step(batch).metrics["offpolicy/mismatch_kl"]

    whole = mismatch("recomputed", 1)
    assert whole > 0.01, "the recorded logprobs are not this policy's"
    assert mismatch("interpolated", 1) == pytest.approx(whole, rel=1e-9)
    assert mismatch("recomputed", 2) == pytest.approx(whole, rel=1e-9)
    assert 0 < mismatch("interpolated", 2) != pytest.approx(whole, rel=1e-3)
