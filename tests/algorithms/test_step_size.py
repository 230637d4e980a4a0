"""The step size that follows the effective sample size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.algorithms.step_size import ess_rate_scale

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@given(WEIGHTS)
def test_ess_rate_scale_equals_the_literal_formula(weights):
    above, below = 0.0, 0.0
    for w in weights:
        above += w
        below += w**2
    scale = ess_rate_scale(torch.tensor(weights, dtype=torch.float64)).item()
    assert scale == pytest.approx(math.sqrt(above**2 / below / len(weights)), rel=1e-12)
    assert 1 / math.sqrt(len(weights)) - 1e-12 <= scale <= 1 + 1e-12


@given(WEIGHTS, st.floats(1e-3, 1e3))
def test_the_scale_of_the_weights_does_not_matter(weights, factor):
    weights = torch.tensor(weights, dtype=torch.float64)
    scale = ess_rate_scale(weights).item()
    assert ess_rate_scale(weights * factor).item() == pytest.approx(scale, rel=1e-9)


def test_on_policy_the_rate_stays_and_one_sample_that_counts_alone_takes_the_root_of_their_number():
    assert ess_rate_scale(torch.ones(7)).item() == pytest.approx(1.0)
    assert ess_rate_scale(torch.tensor([0.0, 5.0, 0.0, 0.0])).item() == pytest.approx(0.5)


def test_without_samples_or_weight_the_rate_stays():
    assert ess_rate_scale(torch.zeros(0)).item() == 1.0
    assert ess_rate_scale(torch.zeros(3)).item() == 1.0
