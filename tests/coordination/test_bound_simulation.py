"""The bound on a virtual clock, with episodes so uneven that admission alone does not hold it."""

from __future__ import annotations

import pytest

from benchmarks.bounded_run import play
from skyrl_async.plan.simulation import Stuck


@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
def test_no_token_beyond_the_bound_in_1e5_trained_tokens(rule):
    outcome = play(rule, max_staleness=2, steps=750)

    assert outcome.trained_tokens >= 100_000
    assert outcome.tokens_over_bound == 0
    assert outcome.staleness_max == 2


def test_the_three_rules_pay_in_different_coin():
    mask, drop, pace = (play(rule, max_staleness=4, steps=150) for rule in ("mask", "drop", "pace"))

    assert mask.masked_fraction > 0.2 and mask.dropped_fraction < 0.01
    assert drop.masked_fraction == 0 and 0.1 < drop.dropped_fraction < 0.3
    assert drop.lost_generation_fraction > 0.4
    assert drop.lost_over_kept_length is not None and drop.lost_over_kept_length > 3
    assert pace.lost_generation_fraction == 0 and pace.dropped_fraction == 0
    assert pace.steps_time / pace.steps > 2 * mask.steps_time / mask.steps


@pytest.mark.parametrize("max_staleness", range(9))
def test_pace_drops_nothing_and_never_stops(max_staleness):
    for seed in range(2):
        outcome = play("pace", max_staleness=max_staleness, steps=25, seed=seed)

        assert outcome.tokens_over_bound == 0
        assert outcome.dropped_fraction == 0


def test_admission_alone_lets_many_groups_pass_the_bound():
    outcome = play("admission_only", max_staleness=2, steps=150)

    assert outcome.groups_over_bound_fraction > 0.1
    assert outcome.staleness_max > 4 * 2


def test_pace_without_look_ahead_deadlocks():
    with pytest.raises(Stuck, match="nothing is under way"):
        play("pace_no_lookahead", max_staleness=4, steps=150)


@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
def test_bound_0_is_synchronous_training_by_the_same_path(rule):
    outcome = play(rule, max_staleness=0, steps=80)

    assert outcome.staleness_max == 0
    assert outcome.dropped_fraction == 0 and outcome.masked_fraction == 0
    assert outcome.learner_busy_fraction == pytest.approx(outcome.steps / outcome.steps_time)
