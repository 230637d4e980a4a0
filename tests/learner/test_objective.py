"""The objective of whole minibatches, against the formula, and whatever the split."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.algorithms.behavior_losses import m2po
from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.config_loading import load_config
from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.logprobs import TokenOutputs
from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.objective import Objective, objective
from skyrl_async.learner.packing import Microbatch, first_loss_indices, pack
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.targets import make_targets
from skyrl_async.runtime.settings import algorithm_settings
from tests.algorithms.literal_losses import m2_kept
from tests.records import random_batch

F64 = torch.float64
COEFFICIENT = "algorithm.squared_log_ratio_coefficient"
PLAIN = AlgorithmSettings(entropy_coefficient=0.0, advantage="mean_centered")


class Scene:
    """One minibatch with made-up logprobs, so that every value is known without a model."""

    def __init__(self, seed: int, algorithm: AlgorithmSettings) -> None:
        groups = random_batch(seed, train_version=3, num_groups=3, group_size=4).groups
        sequences = make_sequences(groups, advantage=partial(estimate, algorithm.advantage))
        self.sequences = [
            replace(s, truncated=number % 3 == 0) for number, s in enumerate(sequences)
        ]
        self.batch = LossBatch.of(self.sequences, dtype=F64)
        rng = torch.Generator().manual_seed(seed)
        shape = self.batch.behavior_logprobs.shape
        noise = [0.6 * torch.randn(shape, generator=rng, dtype=F64) for _ in range(3)]
        self.proximal = self.batch.behavior_logprobs + noise[0]
        self.current = (self.proximal + noise[1]).requires_grad_()
        self.reference = self.proximal + noise[2]
        self.entropy = torch.rand(shape, generator=rng, dtype=F64)
        self.algorithm = algorithm
        self.targets = make_targets(
            self.batch,
            algorithm,
            proximal_logprobs=self.proximal,
            reference_logprobs=self.reference if algorithm.kl.coefficient else None,
        )

    def results(self, cuts: list[int]) -> Iterator[tuple[Microbatch, Objective]]:
        """Yield every microbatch and its objective, the sequences being split at ``cuts``."""
        bounds = [0, *sorted(cuts), len(self.sequences)]
        firsts = first_loss_indices(self.sequences)
        for start, end in pairwise(bounds):
            for microbatch in pack(
                self.sequences[start:end],
                tokens_per_microbatch=64,
                dtype=F64,
                first_indices=firsts[start:end],
            ):
                index = microbatch.index
                outputs = TokenOutputs(logprobs=self.current[index], entropy=self.entropy[index])
                yield (
                    microbatch,
                    objective(
                        outputs,
                        microbatch,
                        self.batch,
                        self.targets,
                        proximal_logprobs=self.proximal[index],
                        settings=self.algorithm,
                    ),
                )

    def total(self, cuts: list[int]) -> torch.Tensor:
        """Return the objective with the sequences split into microbatches at ``cuts``."""
        return sum((r.total for _, r in self.results(cuts)), start=torch.zeros((), dtype=F64))

    def gradient(self, cuts: list[int]) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(self.total(cuts), self.current)
        return gradient


def test_the_default_is_decoupled_ppo_with_a_truncated_weight_token_by_token():
    options = {"clip_low": 0.2, "clip_high": 0.28}
    scene = Scene(0, replace(PLAIN, loss_options=options))
    total = 0.0
    for t in range(len(scene.current)):
        behavior, proximal = scene.batch.behavior_logprobs[t].item(), scene.proximal[t].item()
        current, advantage = scene.current[t].item(), scene.batch.advantages[t].item()
        weight = min(math.exp(proximal - behavior), 2.0)
        ratio = math.exp(current - proximal)
        clipped = min(max(ratio, 1 - 0.2), 1 + 0.28)
        total += -weight * min(ratio * advantage, clipped * advantage)
    assert scene.total([]).item() == pytest.approx(total / len(scene.current), rel=1e-9)


def test_entropy_and_divergence_are_added_with_their_coefficients():
    plain = Scene(1, PLAIN).total([]).item()
    with_entropy = Scene(1, replace(PLAIN, entropy_coefficient=0.5))
    gained = with_entropy.total([]).item() - plain
    assert gained == pytest.approx(-0.5 * with_entropy.entropy.mean().item(), rel=1e-6)
    with_kl = Scene(1, replace(PLAIN, kl=KlSettings(coefficient=0.3, estimator="k2")))
    k2 = 0.5 * (with_kl.current - with_kl.reference).square().mean().item()
    assert with_kl.total([]).item() - plain == pytest.approx(0.3 * k2, rel=1e-6)


@pytest.mark.parametrize("overrides", [[], ["correction.token_high=1.4", "algorithm.loss=aipo"]])
def test_the_squared_log_ratio_is_added_by_configuration_without_weight_to_the_kept_tokens(
    overrides,
):
    plain, with_it = (
        algorithm_settings(load_config(None, [*overrides, f"{COEFFICIENT}={value}"]))
        for value in (0, 0.25)
    )
    assert plain.squared_log_ratio_coefficient == 0
    scene = Scene(1, with_it)
    ratios = (scene.proximal - scene.batch.behavior_logprobs).exp()
    kept = ratios <= 1.4 if overrides else torch.ones_like(ratios, dtype=torch.bool)
    assert 0 < kept.sum() < len(kept) or not overrides
    apart = (scene.current - scene.batch.behavior_logprobs)[kept]
    added = 0.25 * sum(x**2 for x in apart.tolist()) / len(apart)
    assert scene.total([]).item() - Scene(1, plain).total([]).item() == pytest.approx(added)
    slopes = scene.gradient([]) - Scene(1, plain).gradient([])
    expected = torch.zeros_like(slopes)
    expected[kept] = 0.25 * 2 * apart.detach() / len(apart)
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-12)


M2PO = replace(
    PLAIN,
    loss=m2po,
    loss_options={"limit": 0.05},
    correction=CorrectionSettings(weight="none", token_mask=(0.3, 3.0)),
)
MASKS = CorrectionSettings(token_mask=(0.5, 1.8), normalize_weights=True)


@pytest.mark.parametrize(
    "algorithm",
    [
        PLAIN,
        replace(PLAIN, correction=MASKS),
        replace(PLAIN, correction=MASKS, aggregation="sequence_mean"),
        replace(PLAIN, correction=CorrectionSettings(m2_limit=0.05), aggregation="prompt_mean"),
        replace(PLAIN, aggregation="constant", aggregation_length=7),
        replace(PLAIN, advantage="batch_normalized", whiten_advantages=True),
        replace(PLAIN, kl=KlSettings(coefficient=0.2, placement="reward")),
        replace(PLAIN, correction=MASKS, squared_log_ratio_coefficient=0.5),
        M2PO,
        replace(PLAIN, mask_truncated=True),
        replace(PLAIN, mask_truncated=True, correction=MASKS, aggregation="sequence_mean"),
    ],
    ids=[
        *("plain", "masks", "sequences", "prompts", "constant", "whitened", "kl in reward"),
        *("squared log ratio", "m2po", "without truncated", "without truncated, masks"),
    ],
)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_value_and_gradient_do_not_depend_on_the_split(algorithm, seed, cuts):
    scene = Scene(seed, algorithm)
    cuts = [min(cut, len(scene.sequences)) for cut in cuts]
    assert scene.total(cuts).item() == pytest.approx(scene.total([]).item(), abs=1e-12)
    torch.testing.assert_close(scene.gradient(cuts), scene.gradient([]), rtol=0, atol=1e-12)


def test_m2po_has_the_mask_of_the_whole_minibatch_over_the_tokens_that_are_kept():
    scene = Scene(5, M2PO)
    log_ratios = (scene.proximal - scene.batch.behavior_logprobs).tolist()
    advantages = scene.batch.advantages.tolist()
    kept = [t for t, x in enumerate(log_ratios) if 0.3 <= math.exp(x) <= 3.0]
    chosen = m2_kept([log_ratios[t] for t in kept], [advantages[t] for t in kept], 0.05)
    assert 0 < sum(chosen) < len(kept) < len(log_ratios)
    w = (scene.current - scene.batch.behavior_logprobs).exp().tolist()
    terms = [-w[t] * advantages[t] for t, inside in zip(kept, chosen, strict=True) if inside]
    assert scene.total([3, 7]).item() == pytest.approx(sum(terms) / len(kept), rel=1e-9)
    clipped = sum(r.sums["clipped"].item() for _, r in scene.results([3, 7]))
    assert clipped == len(kept) - len(terms)


def test_a_masked_token_leaves_gradient_and_denominator():
    scene = Scene(2, replace(PLAIN, correction=CorrectionSettings(token_mask=(0.7, 1.4))))
    ratios = (scene.proximal - scene.batch.behavior_logprobs).exp()
    kept = (ratios >= 0.7) & (ratios <= 1.4)
    assert 0 < kept.sum() < len(kept)
    gradient = scene.gradient([])
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))
    assert scene.targets.aggregation.sum().item() == pytest.approx(1.0)
    assert scene.targets.aggregation[~kept].sum() == 0


@pytest.mark.parametrize("masks", [False, True])
def test_truncated_trajectories_leave_gradient_denominator_and_counts(masks):
    correction = replace(MASKS, token_mask=(0.01, 100.0)) if masks else CorrectionSettings()
    scene = Scene(6, replace(PLAIN, correction=correction, mask_truncated=True))
    out = scene.batch.truncated[scene.batch.sequence_ids]
    assert 0 < out.sum() < len(out)
    gradient = scene.gradient([])
    assert not gradient[out].any() and gradient[~out].any()
    assert scene.targets.aggregation[~out].tolist() == pytest.approx(
        [1 / int((~out).sum())] * int((~out).sum())
    )
    sums = [r.sums for _, r in scene.results([4])]
    assert sum(s["tokens"].item() for s in sums) == (~out).sum()
    assert sum(s["masked"].item() for s in sums) == out.sum()
    whole = Scene(6, replace(PLAIN, correction=correction))
    assert whole.gradient([])[out].any(), "without the setting they are trained"


def test_a_broken_policy_is_not_hidden_by_a_mask():
    scene = Scene(3, replace(PLAIN, correction=CorrectionSettings(token_mask=(0.7, 1.4))))
    with torch.no_grad():
        scene.current[0] = float("nan")
    assert math.isnan(scene.total([]).item())


def test_the_reward_is_at_the_last_token_of_each_trajectory_and_turns_are_counted():
    scene = Scene(4, PLAIN)
    rewards = scene.batch.token_rewards()
    for number, sequence in enumerate(scene.sequences):
        own = rewards[scene.batch.sequence_ids == number]
        assert own[-1] == pytest.approx(sequence.reward) and not own[:-1].any()
        where = np.flatnonzero(sequence.loss_mask)
        gaps = [after - before > 1 for before, after in pairwise(where)]
        turns = [sum(gaps[:t]) for t in range(len(where))]
        assert scene.batch.turn_ids[scene.batch.sequence_ids == number].tolist() == turns
