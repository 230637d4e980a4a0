"""What a minibatch's loss is compared with, against formulas over whole sequences."""

import math
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.targets import make_targets, whitened
from tests.algorithms import literal_advantages as literal
from tests.records import random_batch

F64 = torch.float64
GAE = AlgorithmSettings(advantage="gae", gamma=0.9, gae_lambda=0.8, critic=CriticSettings())


class Scene:
    """Sequences of several turns with random values and logprobs of their loss tokens."""

    def __init__(self, seed: int) -> None:
        groups = random_batch(seed, train_version=3, num_groups=3, group_size=4).groups
        self.sequences = make_sequences(groups, advantage=partial(estimate, "mean_centered"))
        self.batch = LossBatch.of(self.sequences, dtype=F64)
        rng = torch.Generator().manual_seed(seed)
        shape = self.batch.behavior_logprobs.shape
        noise = [0.3 * torch.randn(shape, generator=rng, dtype=F64) for _ in range(3)]
        self.proximal = self.batch.behavior_logprobs + noise[0]
        self.reference = self.proximal + noise[1]
        self.values = noise[2]

    def targets(self, settings: AlgorithmSettings, **missing: None):
        given = {
            "proximal_logprobs": self.proximal,
            "reference_logprobs": self.reference,
            "values": self.values,
        }
        return make_targets(self.batch, settings, **{**given, **missing})

    def actions(self, number: int) -> list[int]:
        """Return the lengths of the replies of one sequence, which lie between observations."""
        mask = self.sequences[number].loss_mask
        return [len(list(run)) for sampled, run in groupby(mask.tolist()) if sampled]

    def of(self, number: int) -> torch.Tensor:
        return self.batch.sequence_ids == number


def split(values: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in values.split(lengths)]


def flat(nested: list[list[float]]) -> list[float]:
    return [value for row in nested for value in row]


@pytest.mark.parametrize("seed", range(4))
def test_gae_steps_over_observations_as_the_skip_observation_form_does(seed):
    scene = Scene(seed)
    targets = scene.targets(GAE)
    assert targets.values is not None
    assert max(len(scene.actions(n)) for n in range(len(scene.sequences))) > 1
    for number, sequence in enumerate(scene.sequences):
        own, actions = scene.of(number), scene.actions(number)
        rewards = [[0.0] * length for length in actions]
        rewards[-1][-1] = sequence.reward
        values = split(scene.values[own], actions)
        advantages = flat(literal.skip_observation_gae(rewards, values, 0.0, 0.9, 0.8))
        assert targets.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)
        drawn_to = [a + v for a, v in zip(advantages, flat(values), strict=True)]
        assert targets.values.targets[own].tolist() == pytest.approx(drawn_to, abs=1e-12)


def test_a_divergence_in_the_reward_is_paid_token_by_token_before_gae():
    scene = Scene(1)
    settings = replace(GAE, kl=KlSettings(coefficient=0.3, placement="reward"))
    targets = scene.targets(settings)
    for number, sequence in enumerate(scene.sequences):
        own = scene.of(number)
        rewards = (-0.3 * (scene.proximal - scene.reference)[own]).tolist()
        rewards[-1] += sequence.reward
        values = [*scene.values[own].tolist(), 0.0]
        advantages, _ = literal.gae(rewards, values, 0.9, [0.8] * len(rewards))
        assert targets.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)


def test_without_a_critic_the_divergence_to_come_is_compared_within_the_prompt():
    scene = Scene(2)
    settings = AlgorithmSettings(
        advantage="mean_centered", kl=KlSettings(coefficient=0.3, placement="reward")
    )
    paid = torch.zeros_like(scene.values)
    for number in range(len(scene.sequences)):
        own = scene.of(number)
        kl = (scene.proximal - scene.reference)[own].tolist()
        to_go = literal.reinforce_plus_plus_returns([0.0] * len(kl), kl, 0.3, 1.0)
        paid[own] = torch.tensor(to_go, dtype=F64)
    for prompt in scene.batch.prompt_ids.unique():
        own = scene.batch.prompt_ids == prompt
        paid[own] -= paid[own].mean()
    expected = scene.batch.advantages + paid
    torch.testing.assert_close(scene.targets(settings, values=None).advantages, expected)


def test_the_adaptive_lambda_is_for_the_policy_and_the_critic_learns_whole_returns():
    scene = Scene(3)
    settings = replace(GAE, advantage="length_adaptive_gae", gamma=1.0, length_adaptive_alpha=0.5)
    targets = scene.targets(settings)
    assert targets.values is not None
    for number, sequence in enumerate(scene.sequences):
        own = scene.of(number)
        length = int(own.sum())
        lam = min(max(1 - 1 / (0.5 * length), 0.0), 1.0)
        rewards = [*[0.0] * (length - 1), sequence.reward]
        values = [*scene.values[own].tolist(), 0.0]
        advantages, _ = literal.gae(rewards, values, 1.0, [lam] * length)
        assert targets.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)
        assert targets.values.targets[own].tolist() == pytest.approx([sequence.reward] * length)


@pytest.mark.parametrize("weight", ["none", "token"])
def test_vtrace_advantages_carry_the_weight_that_the_correction_does_not(weight):
    scene = Scene(0)
    settings = replace(
        GAE, advantage="vtrace", correction=CorrectionSettings(weight=weight, weight_cap=1.0)
    )
    targets = scene.targets(settings)
    ratios = (scene.proximal - scene.batch.behavior_logprobs).exp().clamp(max=1.0)
    for number, sequence in enumerate(scene.sequences):
        own = scene.of(number)
        rewards = [*[0.0] * (int(own.sum()) - 1), sequence.reward]
        values, w = [*scene.values[own].tolist(), 0.0], ratios[own].tolist()
        v, _, _ = literal.vtrace(rewards, values, w, 0.9, 0.8, 1.0, 1.0)
        mixed = [0.2 * a + 0.8 * b for a, b in zip(values[1:], [*v[1:], 0.0], strict=True)]
        plain = [
            r + 0.9 * after - value
            for r, after, value in zip(rewards, mixed, values[:-1], strict=True)
        ]
        factor = w if weight == "none" else [1.0] * len(w)
        expected = [f * a for f, a in zip(factor, plain, strict=True)]
        assert targets.advantages[own].tolist() == pytest.approx(expected, abs=1e-12)


def test_advantages_are_whitened_over_the_kept_tokens_and_shares_are_theirs():
    scene = Scene(1)
    settings = replace(
        GAE, whiten_advantages=True, correction=CorrectionSettings(token_mask=(0.8, 1.25))
    )
    targets = scene.targets(settings)
    ratios = (scene.proximal - scene.batch.behavior_logprobs).exp()
    kept = (ratios >= 0.8) & (ratios <= 1.25)
    assert 1 < kept.sum() < len(kept)
    chosen = targets.advantages[kept].numpy()
    assert np.mean(chosen) == pytest.approx(0, abs=1e-9)
    assert np.std(chosen) == pytest.approx(1, abs=1e-5)
    assert targets.aggregation[kept].tolist() == pytest.approx([1 / int(kept.sum())] * len(chosen))
    assert not targets.aggregation[~kept].any()


def test_whitening_equal_or_no_advantages_gives_zeros_or_none():
    assert whitened(torch.full((3,), 2.0), None).tolist() == [0.0] * 3
    alone = whitened(torch.tensor([1.0, 5.0]), torch.zeros(2, dtype=torch.bool))
    assert alone.tolist() == [1.0, 5.0]
    two = whitened(torch.tensor([1.0, 3.0]), None).tolist()
    assert two == pytest.approx([-1 / (1 + 1e-6), 1 / (1 + 1e-6)]) and not math.isnan(two[0])


@pytest.mark.parametrize(
    ("settings", "missing", "words"),
    [
        (GAE, "values", "these settings need values"),
        (GAE, "proximal_logprobs", "these settings need proximal logprobs"),
        (
            replace(GAE, kl=KlSettings(coefficient=0.1, placement="reward")),
            "reference_logprobs",
            "these settings need reference logprobs",
        ),
    ],
)
def test_what_is_needed_and_missing_is_named(settings, missing, words):
    with pytest.raises(ValueError, match=words):
        Scene(0).targets(settings, **{missing: None})
