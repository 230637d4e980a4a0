"""What a step reports, against means over its tokens, and whatever the split."""

import math
from dataclasses import replace

import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import KlSettings
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.step_metrics import StepSums
from tests.learner.test_objective import PLAIN, Scene

VERSION = 3
ALGORITHM = replace(
    PLAIN,
    correction=CorrectionSettings(token_mask=(0.5, 3.0), weight_cap=1.5),
    kl=KlSettings(coefficient=0.1, estimator="k2"),
)


def sums_of(scene: Scene, *, cuts: list[int]) -> StepSums:
    sums = StepSums(train_version=VERSION)
    for microbatch, result in scene.results(cuts):
        sums.add(microbatch, result, at_start=scene.proximal[microbatch.index])
    return sums


def test_metrics_are_means_over_the_kept_tokens():
    scene = Scene(0, ALGORITHM)
    metrics = sums_of(scene, cuts=[]).metrics(RankGroup())
    log_ratios = (scene.proximal - scene.batch.behavior_logprobs).tolist()
    kept = [t for t, x in enumerate(log_ratios) if 0.5 <= math.exp(x) <= 3.0]
    weights = [min(math.exp(log_ratios[t]), 1.5) for t in kept]
    assert 0 < len(kept) < len(log_ratios)
    policy = (scene.current - scene.proximal).exp().tolist()
    advantages = scene.batch.advantages.tolist()
    clipped = [
        t
        for t in kept
        if (advantages[t] > 0 and policy[t] > 1.28) or (advantages[t] < 0 and policy[t] < 0.8)
    ]
    apart = (scene.current - scene.reference).tolist()

    def mean(values: list[float]) -> float:
        return sum(values) / len(kept)

    expected = {
        "learner/loss_tokens": len(kept),
        "policy/entropy": mean([scene.entropy[t].item() for t in kept]),
        "offpolicy/importance_weight_mean": mean(weights),
        "offpolicy/ess_fraction": sum(weights) ** 2 / (len(kept) * sum(w * w for w in weights)),
        "offpolicy/importance_weight_max": math.exp(max(log_ratios)),
        "offpolicy/importance_weight_capped_fraction": mean(
            [float(math.exp(log_ratios[t]) > 1.5) for t in kept]
        ),
        # Over all tokens, the rejected ones too: these are the far ones.
        "offpolicy/kl_behavior": sum(math.exp(x) - 1 - x for x in log_ratios) / len(log_ratios),
        "offpolicy/clip_fraction": len(clipped) / len(kept),
        "offpolicy/masked_fraction": 1 - len(kept) / len(log_ratios),
        "loss/kl": mean([0.5 * apart[t] ** 2 for t in kept]),
    }
    assert clipped
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_weights_of_sequences_are_reported_as_such():
    scene = Scene(
        0, replace(PLAIN, correction=CorrectionSettings(weight="sequence", weight_cap=1.5))
    )
    metrics = sums_of(scene, cuts=[]).metrics(RankGroup())
    log_ratios = scene.proximal - scene.batch.behavior_logprobs
    ids = scene.batch.sequence_ids
    products = [math.exp(log_ratios[ids == i].sum()) for i in ids.tolist()]
    assert any(w > 1.5 for w in products) and any(w < 1.5 for w in products)
    assert metrics["offpolicy/importance_weight_max"] == pytest.approx(max(products), rel=1e-9)
    assert metrics["offpolicy/importance_weight_capped_fraction"] == pytest.approx(
        sum(w > 1.5 for w in products) / len(products)
    )
    assert metrics["offpolicy/importance_weight_mean"] == pytest.approx(
        sum(min(w, 1.5) for w in products) / len(products)
    )


def test_the_split_into_microbatches_changes_nothing():
    scene = Scene(1, ALGORITHM)
    whole = sums_of(scene, cuts=[]).metrics(RankGroup())
    assert sums_of(scene, cuts=[2, 3, 7]).metrics(RankGroup()) == pytest.approx(whole, rel=1e-9)


def test_losses_and_gradient_norms_are_means_over_the_minibatches_that_were_trained():
    first, second = (Scene(seed, ALGORITHM) for seed in (0, 1))
    step = StepSums(train_version=VERSION)
    step.merge(sums_of(first, cuts=[]), grad_norm=1.0)
    step.merge(sums_of(second, cuts=[]), grad_norm=4.0)
    step.value_losses.extend([0.5, 0.25])
    metrics = step.metrics(RankGroup())
    parts = [sums_of(scene, cuts=[]).metrics(RankGroup()) for scene in (first, second)]
    assert metrics["loss/policy"] == pytest.approx(sum(p["loss/policy"] for p in parts) / 2)
    assert metrics["policy/grad_norm"] == 2.5
    assert metrics["loss/value"] == 0.375
    tokens = [p["learner/loss_tokens"] for p in parts]
    entropy = sum(n * p["policy/entropy"] for n, p in zip(tokens, parts, strict=True))
    assert metrics["policy/entropy"] == pytest.approx(entropy / sum(tokens))
    assert metrics["offpolicy/importance_weight_max"] == max(
        p["offpolicy/importance_weight_max"] for p in parts
    )


def test_the_mismatch_is_of_tokens_whose_whole_prefix_has_the_version_of_the_step():
    scene = Scene(2, ALGORITHM)
    metrics = sums_of(scene, cuts=[]).metrics(RankGroup())
    fresh = torch.cat([m.index[m.prefix_versions == VERSION] for m, _ in scene.results([])])
    assert 0 < len(fresh) < len(scene.proximal)
    log_ratios = (scene.proximal - scene.batch.behavior_logprobs)[fresh].tolist()
    expected = sum(math.exp(x) - 1 - x for x in log_ratios) / len(fresh)
    assert metrics["offpolicy/mismatch_kl"] == pytest.approx(expected, rel=1e-9)
    old = StepSums(train_version=VERSION + 1)
    for microbatch, result in scene.results([]):
        old.add(microbatch, result, at_start=scene.proximal[microbatch.index])
    assert "offpolicy/mismatch_kl" not in old.metrics(RankGroup())
    unknown = StepSums(train_version=VERSION)
    (first, result), *_ = scene.results([])
    unknown.add(first, result, at_start=None)
    assert "offpolicy/mismatch_kl" not in unknown.metrics(RankGroup())


def test_a_step_without_tokens_has_finite_metrics():
    metrics = StepSums(train_version=0).metrics(RankGroup())
    assert metrics["offpolicy/ess_fraction"] == 1.0
    assert "loss/value" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
