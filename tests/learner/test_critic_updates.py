"""What moves the values: clipped errors of the tokens in the loss, and all updates of a step."""

import math

import numpy as np
import pytest
import torch

from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import Critic, CriticSettings, ValueTargets
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.logprobs import PolicyModule
from skyrl_async.learner.packing import pack
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.learner.test_packing import GRPO
from tests.records import random_batch

F64 = torch.float64
CLIP, RATE = 0.05, 0.02


class Scene:
    """A linear critic in float64, its inputs, and made-up targets; every third token is masked."""

    def __init__(self, seed: int, *, updates: int = 1, tokens_per_microbatch: int = 4096) -> None:
        policy = build_tiny_model(hidden_size=16, num_heads=2).double()
        groups = random_batch(seed, train_version=3, num_groups=2, group_size=4).groups
        sequences = make_sequences(groups, advantage=GRPO)
        settings = CriticSettings(
            kind="head", learning_rate=RATE, updates=updates, clip=CLIP, max_grad_norm=1e9
        )
        self.critic = Critic(PolicyModule(policy), settings, ranks=RankGroup())
        self.head = self.critic.trainer.module.head
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(generator=rng)
            self.head.bias.fill_(0.3)
        self.microbatches = pack(sequences, tokens_per_microbatch=tokens_per_microbatch, dtype=F64)
        # What the head reads, of one sequence at a time; the last entry is for the bias.
        self.inputs: list[torch.Tensor] = []
        self.shares: list[float] = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
            with torch.no_grad():
                hidden = policy.get_decoder()(input_ids=ids).last_hidden_state[0]
            where = np.flatnonzero(sequence.loss_mask)
            kept = [(len(self.inputs) + t) % 3 != 1 for t in range(len(where))]
            self.inputs += [torch.cat([hidden[t - 1], torch.ones(1, dtype=F64)]) for t in where]
            self.shares += [k / (len(sequences) * max(sum(kept), 1)) for k in kept]
        count = len(self.inputs)
        start = torch.tensor(self.values(self.weights()), dtype=F64)
        self.old = start + 0.04 * torch.randn(count, generator=rng, dtype=F64)
        self.targets = start + 0.5 * torch.randn(count, generator=rng, dtype=F64)

    def weights(self) -> torch.Tensor:
        return torch.cat([self.head.weight.detach()[0], self.head.bias.detach()])

    def values(self, weights: torch.Tensor) -> list[float]:
        return [float(x @ weights) for x in self.inputs]

    def update(self) -> float | None:
        shares = torch.tensor(self.shares, dtype=F64)
        return self.critic.update(
            self.microbatches,
            ValueTargets(old_values=self.old, targets=self.targets, aggregation=shares),
        )


def literal_loss(V, V_old, R, a, eps):
    """Loss, and its derivative by every value."""
    L, slopes = 0.0, []
    for t in range(len(V)):
        clipped = min(max(V[t], V_old[t] - eps), V_old[t] + eps)
        L += a[t] * max((V[t] - R[t]) ** 2, (clipped - R[t]) ** 2) / 2
        is_held = (clipped - R[t]) ** 2 > (V[t] - R[t]) ** 2
        slopes.append(0.0 if is_held else a[t] * (V[t] - R[t]))
    return L, slopes


def literal_of(scene: Scene, weights: torch.Tensor):
    old, targets = scene.old.tolist(), scene.targets.tolist()
    return literal_loss(scene.values(weights), old, targets, scene.shares, CLIP)


@pytest.mark.parametrize("tokens_per_microbatch", [16, 48, 4096])
def test_the_slope_of_every_value_is_that_of_its_clipped_error_times_its_share(
    tokens_per_microbatch,
):
    scene = Scene(0, tokens_per_microbatch=tokens_per_microbatch)
    assert (len(scene.microbatches) == 1) == (tokens_per_microbatch == 4096)
    of_microbatch, seen = scene.critic.values, []

    def recorded(microbatch):
        values = of_microbatch(microbatch)
        values.retain_grad()
        seen.append((microbatch.index, values))
        return values

    scene.critic.values = recorded
    expected, slopes = literal_of(scene, scene.weights())
    held = [s == 0 < a for s, a in zip(slopes, scene.shares, strict=True)]
    masked = [a == 0 for a in scene.shares]
    assert 0 < sum(held) < sum(masked) < len(masked) / 2
    assert scene.update() == pytest.approx(expected, rel=1e-12)
    found = torch.full((len(slopes),), math.nan, dtype=F64)
    for index, values in seen:
        found[index] = values.grad
    assert found.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-15)
    assert not found[torch.tensor(masked)].any()
    of_weights = sum(s * x for s, x in zip(slopes, scene.inputs, strict=True))
    gradient = torch.cat([scene.head.weight.grad[0], scene.head.bias.grad])
    torch.testing.assert_close(gradient, of_weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_a_step_makes_every_update_and_holds_values_around_those_before_the_first(updates):
    scene = Scene(1, updates=updates)
    weights = scene.weights()
    m, v, losses, held = torch.zeros_like(weights), torch.zeros_like(weights), [], []
    for k in range(1, updates + 1):
        loss, slopes = literal_of(scene, weights)
        losses.append(loss)
        held.append(sum(s == 0 < a for s, a in zip(slopes, scene.shares, strict=True)))
        g = sum(s * x for s, x in zip(slopes, scene.inputs, strict=True))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        weights = weights - RATE * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    assert (held[-1] > held[0]) == (updates > 1)
    assert scene.update() == pytest.approx(losses[-1], rel=1e-9)
    assert scene.critic.trainer.optimizer_steps == updates
    torch.testing.assert_close(scene.weights(), weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_the_critic_is_updated_so_often_for_each_update_of_the_policy(kind):
    critic = CriticSettings(kind=kind, updates=3)
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2),
        LearnerSettings(
            algorithm=AlgorithmSettings(advantage="gae", critic=critic), num_minibatches=2
        ),
    )
    learner.step(random_batch(0, train_version=0))
    assert learner.optimizer_steps == 2
    assert learner.critic.trainer.optimizer_steps == 2 * 3
