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
from skyrl_async.learner.algorithm_settings import (
    VALUE_ESTIMATORS,
    WEIGHTED_LOSSES,
    AlgorithmSettings,
    KlSettings,
)
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

    def targets(self, settings: AlgorithmSettings, **other: torch.Tensor | None):
        given = {
            "proximal_logprobs": self.proximal,
            "reference_logprobs": self.reference,
            "values": self.values,
        }
        return make_targets(self.batch, settings, **{**given, **other})

    def rewards(self, number: int) -> list[float]:
        """Return the reward of each loss token of one sequence."""
        zeros = [0.0] * (int(self.of(number).sum()) - 1)
        return [*zeros, self.sequences[number].reward]

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


def test_reinforce_plus_plus_whitens_returns_that_paid_the_divergence_to_come():
    scene = Scene(2)
    settings = AlgorithmSettings(
        advantage="reinforce_plus_plus", kl=KlSettings(coefficient=0.3, placement="reward")
    )
    returns: list[float] = []
    for number in range(len(scene.sequences)):
        kl = (scene.proximal - scene.reference)[scene.of(number)].tolist()
        returns += literal.reinforce_plus_plus_returns(scene.rewards(number), kl, 0.3, 1.0)
    expected = (np.array(returns) - np.mean(returns)) / (np.std(returns) + 1e-6)
    found = scene.targets(settings, values=None).advantages.tolist()
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


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


def literal_returns(scene: Scene, settings: AlgorithmSettings, number: int, after: float):
    """Return advantages and targets of one sequence with the value after its last token."""
    own, rewards = scene.of(number), scene.rewards(number)
    values, T = [*scene.values[own].tolist(), after], len(rewards)
    gamma, lam = settings.gamma, settings.gae_lambda
    w = (scene.proximal - scene.batch.behavior_logprobs)[own].exp().tolist()
    match settings.advantage:
        case "gae":
            return literal.gae(rewards, values, gamma, [lam] * T)
        case "turn_level_gae":
            turns = scene.batch.turn_ids[own].tolist()
            return literal.turn_level_gae(rewards, values, turns, gamma, lam)
        case "length_adaptive_gae":
            own_lam = min(max(1 - 1 / (settings.length_adaptive_alpha * T), 0.0), 1.0)
            advantages, _ = literal.gae(rewards, values, gamma, [own_lam] * T)
            return advantages, literal.gae(rewards, values, gamma, [1.0] * T)[1]
        case "retrace":
            return literal.retrace(rewards, values, w, gamma, lam)
    v, _, _ = literal.vtrace(rewards, values, w, gamma, lam, 1.0, 1.0)
    ahead = [*v[1:], after]
    mixed = [(1 - lam) * a + lam * b for a, b in zip(values[1:], ahead, strict=True)]
    return [r + gamma * x - y for r, x, y in zip(rewards, mixed, values[:-1], strict=True)], v


@pytest.mark.parametrize("advantage", VALUE_ESTIMATORS)
def test_a_value_after_the_last_token_enters_the_returns_of_its_sequence_alone(advantage):
    scene = Scene(5)
    settings = replace(GAE, advantage=advantage, length_adaptive_alpha=0.5)
    after = torch.zeros(scene.batch.num_sequences, dtype=F64)
    after[::2] = torch.linspace(-1, 2, len(after[::2]), dtype=F64)
    cut, ended = scene.targets(settings, bootstrap_values=after), scene.targets(settings)
    for number in range(len(scene.sequences)):
        own = scene.of(number)
        advantages, drawn_to = literal_returns(scene, settings, number, after[number].item())
        assert cut.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)
        assert cut.values.targets[own].tolist() == pytest.approx(drawn_to, abs=1e-12)
        same = torch.equal(cut.advantages[own], ended.advantages[own])
        assert same == (after[number] == 0)


def test_with_a_lambda_of_one_the_last_value_comes_back_discounted_once_for_each_token():
    scene = Scene(6)
    settings = replace(GAE, gae_lambda=1.0)
    after = torch.full((scene.batch.num_sequences,), 2.0, dtype=F64)
    gained = (
        scene.targets(settings, bootstrap_values=after).values.targets
        - scene.targets(settings).values.targets
    )
    for number in range(len(scene.sequences)):
        own = scene.of(number)
        expected = [2.0 * 0.9**k for k in range(int(own.sum()), 0, -1)]
        assert gained[own].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", sorted(WEIGHTED_LOSSES, key=lambda loss: loss.__name__))
def test_vtrace_advantages_carry_no_weight_that_the_loss_has(loss):
    scene = Scene(0)
    settings = replace(
        GAE, advantage="vtrace", loss=loss, correction=CorrectionSettings(weight="none")
    )
    targets = scene.targets(settings)
    for number in range(len(scene.sequences)):
        plain, _ = literal_returns(scene, settings, number, 0.0)
        assert targets.advantages[scene.of(number)].tolist() == pytest.approx(plain, abs=1e-12)


def test_of_turns_the_critic_learns_from_the_first_tokens_alone():
    scene = Scene(2)
    targets = scene.targets(replace(GAE, advantage="turn_level_gae"))
    shares = targets.values.aggregation
    firsts: list[bool] = []
    for number in range(len(scene.sequences)):
        for length in scene.actions(number):
            firsts += [True, *[False] * (length - 1)]
    assert not all(firsts)
    expected = [first / sum(firsts) for first in firsts]
    assert shares.tolist() == pytest.approx(expected)
    assert targets.aggregation.tolist() == pytest.approx([1 / len(firsts)] * len(firsts))


@pytest.mark.parametrize("invalid", [math.nan, math.inf, -math.inf, 0.5])
@pytest.mark.parametrize("correction", [CorrectionSettings(), CorrectionSettings(veto_below=1e-9)])
@pytest.mark.parametrize("advantage", ["mean_centered", *VALUE_ESTIMATORS])
def test_a_token_without_a_behavior_logprob_leaves_loss_and_denominators(
    advantage, correction, invalid
):
    scene = Scene(4)
    place = len(scene.proximal) // 2
    mask = np.concatenate([np.flatnonzero(s.loss_mask) for s in scene.sequences])
    logprobs = [s.behavior_logprobs.copy() for s in scene.sequences]
    logprobs[scene.batch.sequence_ids[place]][mask[place]] = invalid
    scene.sequences = [
        replace(s, behavior_logprobs=values)
        for s, values in zip(scene.sequences, logprobs, strict=True)
    ]
    scene.batch = LossBatch.of(scene.sequences, dtype=F64)
    targets = scene.targets(replace(GAE, advantage=advantage, correction=correction))
    assert targets.aggregation[place] == 0
    assert targets.aggregation.sum().item() == pytest.approx(1.0)
    assert (targets.aggregation > 0).sum() == len(mask) - 1
    assert targets.advantages.isfinite().all()
    if targets.values is not None:
        assert targets.values.targets.isfinite().all()
        assert targets.values.aggregation[place] == 0


@pytest.mark.parametrize("estimator", ["auto", "k1", "k2", "k3", "unbiased_k3"])
def test_every_estimator_of_the_divergence_can_be_paid_in_the_reward(estimator):
    scene = Scene(3)
    settings = replace(GAE, kl=KlSettings(coefficient=0.3, estimator=estimator, placement="reward"))
    targets = scene.targets(settings)
    x = (scene.proximal - scene.reference).tolist()
    w = (scene.proximal - scene.batch.behavior_logprobs).exp().tolist()
    formula = {
        "k1": lambda t: x[t],
        "k2": lambda t: x[t] ** 2 / 2,
        "k3": lambda t: math.exp(-x[t]) - 1 + x[t],
        "unbiased_k3": lambda t: w[t] * (math.exp(-x[t]) - 1 + x[t]),
    }["k1" if estimator == "auto" else estimator]
    paid = torch.tensor([-0.3 * formula(t) for t in range(len(x))], dtype=F64)
    for number, sequence in enumerate(scene.sequences):
        own = scene.of(number)
        rewards = paid[own].tolist()
        rewards[-1] += sequence.reward
        values = [*scene.values[own].tolist(), 0.0]
        advantages, _ = literal.gae(rewards, values, 0.9, [0.8] * len(rewards))
        assert targets.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)


@pytest.mark.parametrize("weight", ["token", "sequence", "geometric"])
def test_the_rate_follows_the_effective_share_of_what_has_a_weight(weight):
    scene = Scene(1)
    correction = CorrectionSettings(weight=weight, weight_cap=1.1, token_mask=(0.7, 1.6))
    settings = AlgorithmSettings(scale_rate_by_ess=True, correction=correction)
    targets = scene.targets(settings)
    assert targets.correction is not None
    kept, used = targets.correction.mask, targets.correction.weights
    samples = used[kept].tolist()
    if weight != "token":
        own = [scene.of(number) & kept for number in range(len(scene.sequences))]
        samples = [used[tokens][0].item() for tokens in own if tokens.any()]
    ess = sum(samples) ** 2 / sum(w**2 for w in samples)
    assert targets.rate_scale == pytest.approx(math.sqrt(ess / len(samples)), rel=1e-12)
    assert targets.rate_scale < 1
    assert scene.targets(replace(settings, scale_rate_by_ess=False)).rate_scale == 1.0


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


def test_masks_that_depend_on_signs_see_the_advantages_that_are_trained():
    scene = Scene(1)
    settings = replace(GAE, whiten_advantages=True, gae_lambda=1.0, gamma=1.0)
    log_ratios = scene.proximal - scene.batch.behavior_logprobs

    opsm = scene.targets(replace(settings, correction=CorrectionSettings(opsm_delta=0.0)))
    unlikely = torch.stack([log_ratios[scene.of(n)].mean() < 0 for n in range(12)])
    expected = ~((opsm.advantages < 0) & unlikely[scene.batch.sequence_ids])
    assert opsm.correction is not None
    assert torch.equal(opsm.correction.mask, expected)
    before = scene.targets(replace(settings, whiten_advantages=False)).advantages
    assert (before.sign() != opsm.advantages.sign()).any(), "whitening moves some across 0"

    m2 = scene.targets(replace(settings, correction=CorrectionSettings(m2_limit=0.01)))
    assert m2.correction is not None
    outward = m2.correction.mask & (m2.advantages * log_ratios > 0)
    assert 0 < log_ratios[outward].square().mean() <= 0.01


@pytest.mark.parametrize("value", [0.3, 0.7, 1000.7])
def test_whitening_makes_nothing_of_rounding(value):
    assert not whitened(torch.full((37,), value), None).any()


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
