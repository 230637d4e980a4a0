"""V-trace with caps of any size, and traces over tokens that have no importance weight."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.loss_batch import LossBatch
from tests.algorithms import literal_advantages as literal
from tests.learner.test_targets import F64, GAE, Scene

VTRACE = replace(GAE, advantage="vtrace")


def literal_vtrace(R, V, w, gamma, lam, rho_cap, c_cap):
    """Advantages without rho, and targets; the advantages look ahead with lambda."""
    T = len(R)
    v, _, _ = literal.vtrace(R, V, w, gamma, lam, rho_cap, c_cap)
    v = [*v, V[T]]
    A = [R[t] + gamma * ((1 - lam) * V[t + 1] + lam * v[t + 1]) - V[t] for t in range(T)]
    return A, v[:T]


@pytest.mark.parametrize("weight", ["none", "token"])
@pytest.mark.parametrize(
    ("rho_cap", "c_cap"), [(1.5, 1.25), (1.5, 1.0), (1.25, 0.6), (0.9, 0.9), (0.8, 0.7)]
)
def test_vtrace_truncates_differences_and_traces_each_with_its_own_cap(rho_cap, c_cap, weight):
    scene = Scene(2)
    correction = CorrectionSettings(weight=weight)
    targets = scene.targets(replace(VTRACE, rho_cap=rho_cap, c_cap=c_cap, correction=correction))
    ratios = (scene.proximal - scene.batch.behavior_logprobs).exp()
    for cap in (rho_cap, c_cap, 1.0):
        assert 0 < (ratios > cap).sum() < len(ratios)
    for number in range(len(scene.sequences)):
        own, rewards = scene.of(number), scene.rewards(number)
        values, w = [*scene.values[own].tolist(), 0.0], ratios[own].tolist()
        plain, drawn_to = literal_vtrace(rewards, values, w, 0.9, 0.8, rho_cap, c_cap)
        factors = [min(x, rho_cap) if weight == "none" else 1.0 for x in w]
        expected = [f * a for f, a in zip(factors, plain, strict=True)]
        assert targets.advantages[own].tolist() == pytest.approx(expected, abs=1e-12)
        assert targets.values.targets[own].tolist() == pytest.approx(drawn_to, abs=1e-12)


class Interrupted(Scene):
    """The third token of the longest trajectory has no behavior logprob that can be one."""

    def __init__(self, seed: int, *, reward: float, invalid: float = math.nan) -> None:
        super().__init__(seed)
        lengths = [int(s.loss_mask.sum()) for s in self.sequences]
        self.number = lengths.index(max(lengths))
        chosen = self.sequences[self.number]
        logprobs = chosen.behavior_logprobs.copy()
        logprobs[np.flatnonzero(chosen.loss_mask)[2]] = invalid
        self.sequences[self.number] = replace(chosen, behavior_logprobs=logprobs, reward=reward)
        self.batch = LossBatch.of(self.sequences, dtype=F64)
        assert max(lengths) >= 6


@pytest.mark.parametrize("invalid", [math.nan, math.inf, 0.5])
@pytest.mark.parametrize("advantage", ["vtrace", "retrace"])
def test_a_token_without_an_importance_weight_has_one_of_zero_in_the_recursion(advantage, invalid):
    scene = Interrupted(3, reward=1.0, invalid=invalid)
    targets = scene.targets(replace(VTRACE, advantage=advantage))
    own = scene.of(scene.number)
    w = (scene.proximal - scene.batch.behavior_logprobs)[own].exp().tolist()
    assert math.isnan(w[2])
    w[2] = 0.0
    values, rewards = [*scene.values[own].tolist(), 0.0], scene.rewards(scene.number)
    if advantage == "vtrace":
        advantages, drawn_to = literal_vtrace(rewards, values, w, 0.9, 0.8, 1.0, 1.0)
    else:
        advantages, drawn_to = literal.retrace(rewards, values, w, 0.9, 0.8)
    assert targets.advantages[own].tolist() == pytest.approx(advantages, abs=1e-12)
    assert targets.values.targets[own].tolist() == pytest.approx(drawn_to, abs=1e-12)
    assert drawn_to[2] == values[2]


@pytest.mark.parametrize("advantage", ["vtrace", "retrace"])
def test_nothing_after_a_token_without_an_importance_weight_reaches_what_is_before_it(advantage):
    lost, won = (Interrupted(3, reward=reward) for reward in (0.0, 1.0))
    own = lost.of(lost.number)
    lost.values = lost.values.clone()
    lost.values[own.nonzero()[3:]] += 0.5
    settings = replace(VTRACE, advantage=advantage)
    (a, b) = (scene.targets(settings) for scene in (lost, won))
    moved = [
        (x[own] != y[own]).tolist()
        for x, y in ((a.advantages, b.advantages), (a.values.targets, b.values.targets))
    ]
    assert not any(moved[0][:2]) and moved[0][2]
    assert not any(moved[1][:3]) and all(moved[1][3:])


def test_a_trace_does_reach_over_a_token_that_has_a_weight():
    (lost, won) = (Interrupted(3, reward=reward, invalid=-4.0) for reward in (0.0, 1.0))
    a, b = (scene.targets(VTRACE).values.targets for scene in (lost, won))
    own = lost.of(lost.number)
    assert torch.equal(a != b, own)
