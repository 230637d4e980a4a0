import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.metrics.values import Histogram, Max, Mean, Std, Sum, ordered

_floats = st.lists(st.floats(-1e3, 1e3), max_size=20)
_integers = st.lists(st.integers(0, 12), max_size=40)


@given(_floats, _floats)
def test_merging_workers_gives_what_one_worker_would_have_seen(left, right):
    both = left + right
    for kind, reference in ((Mean, np.mean), (Std, np.std)):
        merged = kind.of(left)
        merged.merge(kind.of(right))
        if both:
            assert merged.value() == pytest.approx(reference(both), abs=1e-6)
        else:
            assert merged.value() is None


@given(_integers, _integers)
def test_histogram_agrees_with_numpy(left, right):
    merged = Histogram.of(left)
    merged.merge(Histogram.of(right))
    both = left + right
    assert merged.total == len(both)
    if not both:
        assert (merged.value(), merged.percentile(95), merged.max) == (None, None, None)
        return
    assert merged.value() == pytest.approx(np.mean(both))
    assert merged.max == max(both)
    for percent in (0, 50, 95, 100):
        expected = np.percentile(both, percent, method="inverted_cdf")
        assert merged.percentile(percent) == expected


def test_mean_is_weighted():
    mean = Mean(1.0, weight=3)
    mean.add(5.0, weight=1)
    assert mean.value() == 2.0
    mean.add(100.0, weight=0)
    assert mean.value() == 2.0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_mean_refuses_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match="weight must be finite and >= 0"):
        Mean(1.0, weight=weight)


def test_sum_of_nothing_is_zero_and_max_of_nothing_is_nothing():
    assert Sum().value() == 0
    assert Max().value() is None
    largest = Max(2.0)
    largest.merge(Max())
    largest.merge(Max(3.0))
    assert largest.value() == 3.0


def test_max_keeps_a_nan_whenever_it_comes():
    for order in ([math.nan, 1.0], [1.0, math.nan]):
        largest = Max()
        for value in order:
            largest.add(value)
        assert math.isnan(largest.value())


def test_merge_leaves_the_other_one_alone():
    other = Histogram({1: 2})
    merged = Histogram()
    merged.merge(other)
    merged.add(1)
    assert other.counts == {1: 2}


def test_histogram_refuses_fractions_and_negative_counts():
    with pytest.raises(ValueError, match="counts integers, got an array of float64"):
        Histogram.of([0.5])
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        Histogram().add(1, count=-1)
    with pytest.raises(ValueError, match=r"percent must be in \[0, 100\], got 101"):
        Histogram().percentile(101)


def test_histogram_of_an_array_has_plain_numbers():
    histogram = Histogram.of(np.array([[3, 1], [1, 0]], dtype=np.int32))
    assert ordered(histogram.counts) == {0: 1, 1: 2, 3: 1}
    assert all(type(n) is int for item in histogram.counts.items() for n in item)


@pytest.mark.parametrize(
    "accumulator", [Mean(2.0, weight=3), Std.of([1, 2]), Sum(4), Max(5.0), Histogram({0: 2})]
)
def test_accumulators_travel_between_processes(accumulator):
    copy = pickle.loads(pickle.dumps(accumulator))
    assert type(copy) is type(accumulator)
    assert copy.value() == accumulator.value()
