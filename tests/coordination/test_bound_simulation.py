"""The bound on a virtual clock, with episodes so uneven that admission alone does not hold it."""

from __future__ import annotations

import pytest

from benchmarks.staleness_bound import Deadlock, Scenario, Simulation


@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
def test_no_token_beyond_the_bound_in_1e5_trained_tokens(rule):
    outcome = Simulation(Scenario(rule=rule, max_staleness=2, trained_tokens=100_000)).run()

    assert outcome.trained_tokens >= 100_000
    assert outcome.tokens_over_bound == 0
    assert outcome.staleness_max == 2
    print(f"\n{rule}: {outcome}")


def test_the_three_rules_pay_in_different_coin():
    mask, drop, pace = (
        Simulation(Scenario(rule=rule, max_staleness=4, trained_tokens=25_000)).run()
        for rule in ("mask", "drop", "pace")
    )

    assert mask.masked_fraction > 0.2 and mask.dropped_fraction < 0.01
    assert drop.masked_fraction == 0 and 0.1 < drop.dropped_fraction < 0.3
    assert drop.lost_generation_fraction > 0.4 and drop.lost_over_kept_length > 3
    assert pace.lost_generation_fraction == 0 and pace.dropped_fraction == 0
    assert pace.steps_time / pace.steps > 2 * mask.steps_time / mask.steps


@pytest.mark.parametrize("max_staleness", range(9))
def test_pace_drops_nothing_and_never_stops(max_staleness):
    for seed in range(2):
        scenario = Scenario(
            rule="pace", max_staleness=max_staleness, trained_tokens=6_000, seed=seed
        )
        outcome = Simulation(scenario).run()

        assert outcome.tokens_over_bound == 0
        assert outcome.dropped_fraction == 0


def test_admission_alone_lets_many_groups_pass_the_bound():
    scenario = Scenario(rule="admission_only", max_staleness=2, trained_tokens=25_000)

    outcome = Simulation(scenario).run()

    assert outcome.groups_over_bound_fraction > 0.1
    assert outcome.staleness_max > 4 * scenario.max_staleness


def test_pace_without_look_ahead_deadlocks():
    scenario = Scenario(rule="pace_no_lookahead", max_staleness=4, trained_tokens=25_000)

    with pytest.raises(Deadlock):
        Simulation(scenario).run()


@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
def test_bound_0_is_synchronous_training_by_the_same_path(rule):
    outcome = Simulation(Scenario(rule=rule, max_staleness=0, trained_tokens=20_000)).run()

    assert outcome.staleness_max == 0
    assert outcome.dropped_fraction == 0 and outcome.masked_fraction == 0
