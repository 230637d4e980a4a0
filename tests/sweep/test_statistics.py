"""Means, intervals and collapses against literal formulas and tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from skyrl_async.sweep.rows import Row
from skyrl_async.sweep.statistics import (
    difference,
    has_collapsed,
    interval,
    smoothed,
    summarize,
)

T_975 = {1: 12.7062, 2: 4.3027, 9: 2.2622}
"""Student's quantiles at 0.975 by degrees of freedom, from a printed table."""

ROW = Row(
    digest="d",
    cell={"method": "grpo", "lag": 1, "seed": 0},
    status="finished",
    config={"run": {"steps": 3}},
    seconds=2.0,
    reward=0.5,
    reward_final=0.4,
    series={"offpolicy/ess_fraction": [9.0, 0.5, 0.7], "offpolicy/kl_behavior": [9.0, None, 0.1]},
    summary={},
)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_students(count: int):
    values = [0.1 * i * i for i in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    half = T_975[count - 1] * deviation / math.sqrt(count)
    got = interval(values)
    assert (got.mean, got.count) == (pytest.approx(mean), count)
    assert got.high - got.mean == pytest.approx(half, rel=1e-4)
    assert got.mean - got.low == pytest.approx(half, rel=1e-4)


def test_one_value_has_no_width_and_none_is_an_error():
    assert (interval([0.3]).low, interval([0.3]).high) == (0.3, 0.3)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_the_difference_is_welchs():
    first, second = [0.7, 0.9, 0.8], [0.2, 0.3, 0.4, 0.1]
    shares = [0.01 / 3, 0.05 / 3 / 4]  # variances over counts
    freedom = sum(shares) ** 2 / (shares[0] ** 2 / 2 + shares[1] ** 2 / 3)
    assert freedom == pytest.approx(5.0, abs=0.1)
    half = 2.5706 * math.sqrt(sum(shares))  # Student's quantile at 0.975 with 5 degrees
    got = difference(first, second)
    assert (got.mean, got.count) == (pytest.approx(0.8 - 0.25), 3)
    assert got.high - got.mean == pytest.approx(half, rel=0.02)
    assert got.mean - got.low == pytest.approx(half, rel=0.02)


def test_a_difference_needs_two_values_and_may_have_no_width():
    assert difference([1.0, 1.0], [0.5, 0.5]).low == 0.5
    with pytest.raises(ValueError, match="two values of each, got 1 and 2"):
        difference([1.0], [1.0, 2.0])


def test_smoothing_is_over_the_last_values_that_there_are():
    assert smoothed([1.0, 3.0, None, 5.0, 7.0], window=2) == [1.0, 2.0, 2.0, 4.0, 6.0]
    assert smoothed([None, 2.0], window=2) == [0.0, 2.0]


def with_rewards(*rewards: float) -> Row:
    return replace(ROW, series={"reward/mean": rewards})


def test_a_collapse_is_an_end_below_half_of_the_best():
    rise = [0.08 * i for i in range(10)] + [0.8] * 10
    assert not has_collapsed(with_rewards(*rise, *[0.41] * 10))
    assert has_collapsed(with_rewards(*rise, *[0.39] * 10))
    assert has_collapsed(with_rewards(*rise, *[0.0] * 10))


def test_one_lucky_batch_is_no_best_and_no_reward_cannot_be_lost():
    assert not has_collapsed(with_rewards(*[0.1] * 10, 0.5, *[0.1] * 20))
    assert not has_collapsed(with_rewards(*[0.04] * 10, *[0.0] * 10))
    assert not has_collapsed(with_rewards())


def test_seeds_are_averaged_after_the_warm_up_and_failures_counted():
    other = replace(
        ROW,
        cell={**ROW.cell, "seed": 1},
        reward=0.7,
        series={"offpolicy/ess_fraction": [9.0, 0.8, 0.8], "offpolicy/kl_behavior": [9.0]},
    )
    failed = replace(ROW, status="failed", reward=None)
    longer = replace(ROW, config={"run": {"steps": 4}})
    alone = replace(ROW, status="failed", reward=None, cell={"method": "a", "lag": 0, "seed": 0})
    first, second = summarize([longer, other, failed, ROW, alone])
    assert (first.method, first.lag, first.steps, first.failed) == ("grpo", 1, 3, 1)
    assert (first.reward.mean, first.reward.count) == (pytest.approx(0.6), 2)
    assert first.ess_fraction is not None and first.kl_behavior is not None
    assert first.ess_fraction.mean == pytest.approx((0.6 + 0.8) / 2)
    assert (first.kl_behavior.mean, first.kl_behavior.count) == (pytest.approx(0.1), 1)
    assert (second.steps, second.reward.count) == (4, 1)
