"""The critic learns returns, and every estimator with values trains the policy."""

from dataclasses import replace

import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.algorithms.policy_losses import reinforce
from skyrl_async.learner.algorithm_settings import VALUE_ESTIMATORS, AlgorithmSettings
from skyrl_async.learner.critic import Critic, CriticSettings, ValueTargets
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.logprobs import PolicyModule
from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.packing import pack
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.learner.test_packing import GRPO
from tests.records import random_batch


def model():
    return build_tiny_model(hidden_size=16, num_heads=2)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_values_approach_their_targets(kind):
    policy = model()
    critic = Critic(
        PolicyModule(policy),
        CriticSettings(kind=kind, learning_rate=1e-2, clip=None),
        ranks=RankGroup(),
    )
    sequences = make_sequences(random_batch(0, train_version=3).groups, advantage=GRPO)
    batch = LossBatch.of(sequences, dtype=torch.float32)
    microbatches = pack(sequences, tokens_per_microbatch=256)
    targets = ValueTargets(
        old_values=torch.zeros_like(batch.advantages),
        targets=batch.rewards[batch.sequence_ids],
        aggregation=torch.full_like(batch.advantages, 1 / len(batch.advantages)),
    )
    before = {name: p.clone() for name, p in policy.named_parameters()}
    losses = [critic.update(microbatches, targets) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    assert not any(p.grad is not None for p in policy.parameters())


@pytest.mark.parametrize("advantage", VALUE_ESTIMATORS)
@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_step_trains_critic_and_policy(advantage, kind):
    algorithm = AlgorithmSettings(
        advantage=advantage, critic=CriticSettings(kind=kind, updates=2), whiten_advantages=True
    )
    learner = Learner(model(), LearnerSettings(algorithm=algorithm))
    before = [p.detach().clone() for p in learner.model.parameters()]
    result = learner.step(random_batch(0, train_version=0))
    assert not result.skipped and result.metrics["loss/value"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )


def test_a_critic_that_is_not_finite_undoes_the_step():
    algorithm = AlgorithmSettings(advantage="gae", critic=CriticSettings())
    learner = Learner(model(), LearnerSettings(algorithm=algorithm))
    learner.step(random_batch(0, train_version=0))
    before = [p.detach().clone() for p in learner.model.parameters()]
    head = learner.critic.trainer.module.head.bias
    with torch.no_grad():
        head.fill_(float("nan"))
    assert learner.step(random_batch(1, train_version=1)).skipped
    for a, b in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_vtrace_does_not_apply_the_importance_weight_twice():
    """With the correction's weight its advantages are plain; without, they carry the weight."""
    plain = AlgorithmSettings(
        advantage="vtrace",
        loss=reinforce,
        critic=CriticSettings(),
        correction=CorrectionSettings(weight="token", weight_cap=1.0),
        entropy_coefficient=0.0,
    )
    weighted = replace(plain, correction=CorrectionSettings(weight="none"))
    gradients = []
    for algorithm in (plain, weighted):
        learner = Learner(
            model(),
            LearnerSettings(
                algorithm=algorithm,
                num_minibatches=1,
                optimizer=OptimizerSettings(max_grad_norm=1e9),
            ),
        )
        step = learner.trainer.optimizer.step
        seen: list[torch.Tensor] = []
        gradients.append(seen)

        def capture(step=step, learner=learner, seen=seen):
            seen.extend(p.grad.clone() for p in learner.model.parameters())
            step()

        learner.trainer.optimizer.step = capture
        learner.step(random_batch(0, train_version=0))
    assert gradients[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
