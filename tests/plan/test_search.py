from dataclasses import replace

import pytest

from skyrl_async.plan.episodes import DrawnEpisodes
from skyrl_async.plan.scenario import Costs, Scenario
from skyrl_async.plan.search import (
    Hardware,
    divided,
    forecast,
    search_splits,
    simulate_colocated,
    simulate_split,
)
from skyrl_async.plan.simulation import Simulation
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes

SCENARIO = Scenario(
    num_engines=8,
    groups_per_step=32,
    group_size=8,
    max_staleness=2,
    steps=8,
    warmup_steps=2,
    costs=Costs(
        engine=EngineTimes(decode_step_s=0.02, max_concurrent=16),
        learner=StepTimes(step_s_per_token=2e-3),
    ),
)


def episodes():
    return DrawnEpisodes(reply_tokens="lognormal:100,0.5")


def sizes(scenario, *, max_trajectories):
    small = divided(scenario, max_trajectories=max_trajectories)
    return small.num_engines, small.groups_per_step


def test_a_large_scenario_is_divided():
    assert divided(SCENARIO, max_trajectories=256) is SCENARIO
    assert sizes(SCENARIO, max_trajectories=64) == (2, 8)
    assert sizes(SCENARIO, max_trajectories=128) == (4, 16)
    assert sizes(SCENARIO, max_trajectories=1) == (1, 4)  # one engine is left
    # 32 / 7 groups an engine: of 2 and 3 engines, 9 / 2 is closer to that than 14 / 3.
    assert sizes(replace(SCENARIO, num_engines=7), max_trajectories=120) == (2, 9)
    small = divided(SCENARIO, max_trajectories=64)
    assert small.costs.learner.step_s_per_token == pytest.approx(4 * 2e-3)


def test_a_divided_scenario_forecasts_about_the_same():
    large = replace(SCENARIO, num_engines=16, groups_per_step=128, steps=10, warmup_steps=4)
    assert sizes(large, max_trajectories=512) == (8, 64)
    whole, small = Simulation(large, episodes()).run(), forecast(large, episodes)
    assert small.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.05)
    assert small.steps_per_s == pytest.approx(whole.steps_per_s, rel=0.05)
    assert small.staleness_mean == pytest.approx(whole.staleness_mean, abs=0.1)


def test_the_learner_gets_faster_with_its_gpus():
    hardware = Hardware(num_gpus=64, learner_gpus_measured=4, scaling=0.9)
    times = StepTimes(step_s=1.0, step_s_per_token=8.0)
    assert hardware.learner(times, gpus=2).step_s_per_token == 16.0
    grown = hardware.learner(times, gpus=16)
    assert (grown.step_s, grown.step_s_per_token) == (1.0, pytest.approx(8.0 / (4 * 0.9**2)))


def test_the_fastest_split_balances_engines_and_learner():
    # An engine makes at most 16 tokens per 20 ms, 800 a second; a GPU trains 500 a second.
    splits = search_splits(SCENARIO, episodes, hardware=Hardware(num_gpus=26))
    best = splits[0]
    assert [s.forecast.trained_tokens_per_s for s in splits] == sorted(
        (s.forecast.trained_tokens_per_s for s in splits), reverse=True
    )
    assert all(s.num_engines + s.learner_gpus == 26 for s in splits)
    assert 8 <= best.num_engines <= 13
    alone = simulate_split(SCENARIO, episodes, hardware=Hardware(num_gpus=26), num_engines=22)
    assert best.forecast.trained_tokens_per_s > 1.5 * alone.forecast.trained_tokens_per_s


def test_a_split_keeps_to_the_sizes_of_engines_and_ranks():
    hardware = Hardware(num_gpus=20, gpus_per_engine=2, gpus_per_rank=8)
    splits = search_splits(SCENARIO, episodes, hardware=hardware)
    assert {(s.num_engines, s.learner_gpus) for s in splits} == {(6, 8), (2, 16)}


def test_in_turn_on_all_gpus_is_synchronous():
    split = simulate_colocated(SCENARIO, episodes, hardware=Hardware(num_gpus=16))
    assert (split.num_engines, split.learner_gpus, split.max_staleness) == (16, 16, 0)
    assert split.forecast.staleness_max == 0
    assert split.to_json()["colocated"] is True


def test_too_few_gpus_are_refused():
    with pytest.raises(ValueError, match="3 GPUs are too few: an engine takes 2"):
        Hardware(num_gpus=3, gpus_per_engine=2, gpus_per_rank=2)
    with pytest.raises(ValueError, match="scaling must be in"):
        Hardware(num_gpus=3, scaling=0.3)
