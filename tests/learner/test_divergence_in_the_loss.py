"""The divergence from the reference policy within the objective: its formula, and its limits."""

import math
from dataclasses import replace

import pytest
import torch

from skyrl_async.learner.algorithm_settings import KlSettings
from tests.learner.test_objective import F64, PLAIN, Scene

C = 0.3


def literal_k3(x: float) -> float:
    return math.exp(-x) - 1 + x


@pytest.mark.parametrize("cuts", [[], [2, 7]])
def test_unbiased_k3_has_the_weight_of_the_current_to_the_behavior_policy_and_its_gradient(cuts):
    scene = Scene(4, replace(PLAIN, kl=KlSettings(coefficient=C, estimator="unbiased_k3")))
    plain = Scene(4, PLAIN)
    T = len(scene.current)
    x = (scene.current - scene.reference).tolist()
    w = (scene.current - scene.batch.behavior_logprobs).exp().tolist()
    near = (scene.current - scene.proximal).exp().tolist()
    assert min(abs(a - b) for a, b in zip(w, near, strict=True)) > 1e-4
    value = sum(C / T * w[t] * literal_k3(x[t]) for t in range(T))
    assert scene.total(cuts).item() - plain.total(cuts).item() == pytest.approx(value, rel=1e-9)
    # The weight has a gradient too: (w k)' = w k + w k'.
    slopes = [C / T * w[t] * (literal_k3(x[t]) + 1 - math.exp(-x[t])) for t in range(T)]
    gained = scene.gradient(cuts) - plain.gradient(cuts)
    torch.testing.assert_close(gained, torch.tensor(slopes, dtype=F64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("far", [-800.0, -500.0, 500.0, 800.0])
@pytest.mark.parametrize("estimator", ["k3", "unbiased_k3"])
def test_a_token_far_from_the_reference_counts_as_one_at_the_limit(estimator, far):
    scene = Scene(5, replace(PLAIN, kl=KlSettings(coefficient=C, estimator=estimator)))
    plain = Scene(5, PLAIN)
    reference = scene.reference.clone()
    reference[0] = scene.current[0].detach() - far
    scene.targets = replace(scene.targets, reference_logprobs=reference)
    x = (scene.current - reference).tolist()
    assert x[0] == pytest.approx(far) and max(map(abs, x[1:])) < 10
    x[0] = math.copysign(10.0, far)
    w = [1.0] * len(x)
    if estimator == "unbiased_k3":
        w = (scene.current - scene.batch.behavior_logprobs).exp().tolist()
    value = sum(C / len(x) * w[t] * literal_k3(x[t]) for t in range(len(x)))
    assert scene.total([]).item() - plain.total([]).item() == pytest.approx(value, rel=1e-9)
    slope = (scene.gradient([]) - plain.gradient([]))[0].item()
    # Beyond the limit the divergence is level: what is left is the gradient of the weight.
    of_weight = C / len(x) * w[0] * literal_k3(x[0]) if estimator == "unbiased_k3" else 0.0
    assert slope == pytest.approx(of_weight, rel=1e-9, abs=1e-15)


def test_a_token_far_from_the_reference_leaves_a_float32_loss_finite():
    scene = Scene(5, replace(PLAIN, kl=KlSettings(coefficient=C)))
    scene.current = scene.current.detach().float().requires_grad_()
    reference = scene.reference.clone()
    reference[::3] += 500.0
    scene.targets = replace(scene.targets, reference_logprobs=reference.float())
    assert math.isfinite(scene.total([]).item())
    assert scene.gradient([]).isfinite().all()
