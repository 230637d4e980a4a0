from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.coordination.staleness import (
    StalenessCost,
    StalenessRule,
    count_loss_tokens,
    first_use_cost,
    max_admitted,
    min_trainable_version,
    pace_allows,
    staleness,
)
from tests.coordination.groups import make_group


def test_staleness_is_a_difference_of_versions():
    assert staleness(7, token_version=4) == 3
    assert staleness(7, token_version=7) == 0
    with pytest.raises(RuntimeError, match="version 8 cannot be trained"):
        staleness(7, token_version=8)


@given(st.integers(0, 50), st.integers(0, 8))
def test_cut_off_is_the_oldest_version_within_the_bound(train_version, max_staleness):
    cut_off = min_trainable_version(train_version, max_staleness=max_staleness)

    in_bound = [
        v
        for v in range(train_version + 1)
        if staleness(train_version, token_version=v) <= max_staleness
    ]
    assert in_bound[0] == cut_off


@given(st.integers(1, 64), st.integers(0, 8), st.integers(1, 8))
def test_max_admitted_is_the_formula(batch, bound, uses):
    limit = max_admitted(groups_per_step=batch, max_staleness=bound, max_times_sampled=uses)
    assert limit == max(batch, math.floor((bound + 1) * batch / uses))


@pytest.mark.parametrize(
    ("left_over", "expected"),
    [
        ({}, True),
        ({3: 1}, False),  # deadline 5: would expire in this step
        ({4: 2}, True),  # deadline 6: one more step takes both
        ({4: 3}, False),
        ({4: 2, 5: 2}, True),
        ({4: 1, 5: 3}, True),
        ({4: 1, 5: 4}, False),  # five with a deadline of at most 7, two steps of two
        ({5: 4}, True),
        ({3: 0, 5: 4}, True),  # a count of 0 is nothing
    ],
)
def test_pace_looks_ahead_over_all_deadlines(left_over, expected):
    allowed = pace_allows(left_over, train_version=5, max_staleness=2, groups_per_step=2)

    assert allowed is expected


def test_pace_at_bound_0_leaves_nothing_over():
    arguments = {"train_version": 3, "max_staleness": 0, "groups_per_step": 4}

    assert pace_allows({}, **arguments)
    assert not pace_allows({3: 1}, **arguments)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 4), st.integers(0, 6)),
    st.integers(1, 3),
)
def test_pace_allows_exactly_what_the_following_steps_can_train(left_over, batch):
    """Against the definition: train the rest oldest first and see whether a deadline passes."""
    bound, train_version = 4, 4
    rest = sorted(v for v, n in left_over.items() for _ in range(n))
    in_time = all(
        train_version + 1 + position // batch <= version + bound
        for position, version in enumerate(rest)
    )

    allowed = pace_allows(
        left_over, train_version=train_version, max_staleness=bound, groups_per_step=batch
    )

    assert allowed == in_time


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 11),
)
def test_loss_tokens_are_those_at_or_above_the_cut_off(versions, cut_off):
    group = make_group(0, versions)

    expected = [sum(v >= cut_off for v in member) for member in versions]

    counted = [count_loss_tokens(t, min_trainable_version=cut_off) for t in group.trajectories]
    assert counted == expected
    assert count_loss_tokens(group, min_trainable_version=cut_off) == sum(expected)


def test_mask_counts_the_newest_token_and_the_others_the_oldest():
    group = make_group(0, [[2, 3], [3, 6]])

    deadlines = {
        name: StalenessRule(name=name, max_staleness=4, groups_per_step=1).deadline(group)
        for name in ("mask", "drop", "pace")
    }

    assert deadlines == {"mask": 10, "drop": 6, "pace": 6}


def test_only_pace_holds_a_batch_back():
    left_over = {0: 100}

    allowed = {
        name: StalenessRule(name=name, max_staleness=1, groups_per_step=1).allows(
            left_over, train_version=1
        )
        for name in ("mask", "drop", "pace")
    }

    assert allowed == {"mask": True, "drop": True, "pace": False}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "wait"}, "mask, drop or pace, got 'wait'"),
        ({"max_staleness": -1}, "staleness.max must be >= 0"),
        ({"groups_per_step": 0}, "groups_per_step >= 1"),
    ],
)
def test_bad_rule_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StalenessRule(**{"name": "mask", "max_staleness": 1, "groups_per_step": 1, **values})


def test_cost_of_a_masked_and_of_a_dropped_group():
    # Cut-off 5: the first member is lost, the second loses one of three tokens.
    group = make_group(0, [[3, 4], [4, 5, 6]])

    masked = first_use_cost(group, min_trainable_version=5)
    dropped = first_use_cost(group, min_trainable_version=None)

    assert (masked.lost_tokens, masked.kept_tokens) == (3, 2)
    assert (masked.lost_trajectories, masked.lost_trajectory_tokens) == (1, 2)
    assert (masked.kept_trajectories, masked.kept_trajectory_tokens) == (1, 3)
    assert (dropped.lost_tokens, dropped.kept_tokens) == (5, 0)
    assert (dropped.lost_trajectories, dropped.kept_trajectories) == (2, 0)
    in_batch = StalenessCost(masked_tokens=3, trained_tokens=2)
    assert (masked + dropped + in_batch).metrics() == {
        "lost_generation_fraction": 0.8,
        "masked_fraction": 0.6,
        "lost_over_kept_length": (7 / 3) / 3,
    }


def test_cost_without_data_gives_no_metrics():
    assert StalenessCost().metrics() == {}
