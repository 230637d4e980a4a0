"""Surrogates that keep no gradient where a trust region ends, number by number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.clipping import (
    check_cap,
    check_clip_range,
    clipped_surrogate,
    finite_exp,
    masked_surrogate,
    weighted_reinforce,
    with_slopes,
)

ROWS = st.lists(
    st.tuples(st.floats(-2, 2), st.sampled_from([-1.5, 0.0, 2.0])), min_size=1, max_size=10
)


def columns(rows):
    log_ratios, advantages = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    return log_ratios.requires_grad_(), advantages


@settings(deadline=None, max_examples=60)
@given(ROWS, st.floats(0, 1), st.floats(0, 2))
def test_the_surrogate_is_the_smaller_of_plain_and_clipped_and_has_the_slope_of_that(
    rows, low, high
):
    log_ratios, advantages = columns(rows)
    result = clipped_surrogate(log_ratios, advantages, clip_low=low, clip_high=high)
    (slopes,) = torch.autograd.grad(result.loss.sum(), log_ratios)
    for (x, advantage), loss, clipped, slope in zip(
        rows, result.loss.tolist(), result.clipped.tolist(), slopes.tolist(), strict=True
    ):
        ratio = math.exp(x)
        plain, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
        assert loss == pytest.approx(-min(plain, bounded), abs=1e-12)
        if abs(plain - bounded) > 1e-9 or advantage == 0:
            assert clipped == (bounded < plain)
            assert slope == pytest.approx(0.0 if clipped else -plain, abs=1e-12)


def test_the_cap_ends_the_ratio_of_bad_tokens_only():
    log_ratios, advantages = columns([(math.log(4.0), -1.0), (math.log(2.0), -1.0)])
    result = clipped_surrogate(
        log_ratios, advantages, clip_low=0.2, clip_high=9.0, negative_cap=3.0
    )
    assert result.loss.tolist() == pytest.approx([3.0, 2.0])
    assert result.clipped.tolist() == [True, False]
    good = clipped_surrogate(log_ratios, -advantages, clip_low=0.2, clip_high=9.0, negative_cap=3.0)
    assert good.loss.tolist() == pytest.approx([-4.0, -2.0])


def test_a_ratio_that_would_overflow_is_zero_where_dropped_or_without_advantage():
    log_ratios = torch.tensor([1e6, 1e6, math.log(2.0)], requires_grad=True)
    dropped = torch.tensor([True, False, False])
    result = masked_surrogate(log_ratios, torch.tensor([3.0, 0.0, 3.0]), dropped)
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_ratios)
    assert result.loss.tolist() == pytest.approx([0.0, 0.0, -6.0])
    assert gradient.tolist() == pytest.approx([0.0, 0.0, -6.0])
    assert result.clipped is dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exponential_ends_at_the_root_of_the_largest_number_of_its_type(dtype):
    root = math.sqrt(torch.finfo(dtype).max)
    found = finite_exp(torch.tensor([-math.inf, 0.0, 1e6], dtype=dtype)).tolist()
    assert found == pytest.approx([0, 1, root], rel=1e-6)


def test_values_are_given_their_slopes():
    variable = torch.tensor([-1.5, 2.0], requires_grad=True)
    values = with_slopes(torch.tensor([7.0, -1.0]), torch.tensor([0.0, 5.0]), variable)
    (gradient,) = torch.autograd.grad(values.sum(), variable)
    assert values.tolist() == [7.0, -1.0]
    assert gradient.tolist() == [0.0, 5.0]


def test_weighted_reinforce_has_the_slope_of_weight_times_advantage():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights, advantages = torch.tensor([0.5, 2.0]), torch.tensor([3.0, -1.0])
    result = weighted_reinforce(logprobs, advantages, weights=weights)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    assert result.loss.tolist() == [1.5, -4.0]
    assert gradient.tolist() == [-1.5, 2.0]
    assert result.clipped.tolist() == [False, False]
    told = torch.tensor([True, False])
    assert weighted_reinforce(logprobs, advantages, weights=weights, clipped=told).clipped is told


@pytest.mark.parametrize("low", [-0.1, 1.1, math.nan])
def test_a_lower_bound_that_is_none_is_refused(low):
    with pytest.raises(ValueError, match=f"clip_low must be in 0 .. 1, got {low}"):
        check_clip_range(low, 0.2)
    check_clip_range(0.0, 0.0)
    check_clip_range(1.0, 1e9)


def test_an_upper_bound_below_one_and_a_cap_below_one_are_refused():
    with pytest.raises(ValueError, match=r"clip_high must be at least 0, got -0.1"):
        check_clip_range(0.2, -0.1)
    with pytest.raises(ValueError, match=r"cap must be at least 1, got 0.9"):
        check_cap(0.9)
    check_cap(1.0)
