from dataclasses import replace

import pytest

from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.plan.episodes import DrawnEpisodes, Episode, RecordedEpisodes
from skyrl_async.plan.scenario import Costs, Scenario
from skyrl_async.plan.simulation import Simulation, Stuck
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.types import SampledBatch

HEAVY = {"turns": "uniform:1,4", "reply_tokens": "lognormal:20,1.0", "waits_s": "exponential:0.2"}


def play(scenario, **episodes):
    return Simulation(scenario, DrawnEpisodes(**{**HEAVY, **episodes})).run()


def scenario(*, step_s=0.0, step_s_per_token=0.0, engine=None, **values):
    costs = Costs(
        engine=engine or EngineTimes(decode_step_s=0.01),
        learner=StepTimes(step_s=step_s, step_s_per_token=step_s_per_token),
        publish_s=values.pop("publish_s", 0.0),
        report_s=values.pop("report_s", 0.0),
    )
    sizes = {"groups_per_step": 4, "group_size": 4, "steps": 40, "warmup_steps": 5}
    return Scenario(costs=costs, **{**sizes, **values})


def test_synchronous_steps_take_playing_plus_training_plus_publishing():
    # One reply of 10 tokens at 10 ms, a wait of 0.3 s, a step of 0.5 s, 0.2 s until it is live.
    shape = scenario(max_staleness=0, step_s=0.5, publish_s=0.2)
    said = play(shape, turns="fixed:1", reply_tokens="fixed:10", waits_s="fixed:0.3")
    assert 1 / said.steps_per_s == pytest.approx(0.1 + 0.3 + 0.5 + 0.2)
    assert said.trajectories_per_s == pytest.approx(16 / 1.1)
    assert said.tokens_per_s == pytest.approx(160 / 1.1)
    assert said.learner_idle_fraction == pytest.approx(0.6 / 1.1)
    assert said.engine_idle_fraction == pytest.approx(1.0 / 1.1)
    assert (said.staleness_mean, said.staleness_max) == (0.0, 0)


def test_a_slow_learner_sets_the_pace_when_generation_may_run_ahead():
    said = play(scenario(max_staleness=4, step_s=5.0))
    assert said.steps_per_s == pytest.approx(1 / 5.0)
    assert said.learner_idle_fraction == pytest.approx(0.0, abs=1e-9)


def test_the_learner_takes_time_for_every_token_of_its_batch():
    # 16 trajectories of 8 prompt tokens, 10, 4 and 10 tokens.
    shape = scenario(max_staleness=4, step_s=1.0, step_s_per_token=0.01)
    said = play(shape, turns="fixed:2", reply_tokens="fixed:10")
    assert 1 / said.steps_per_s == pytest.approx(1.0 + 0.01 * 16 * 32)


def test_busy_engines_set_the_pace_when_the_learner_is_fast():
    # 32 slots for 8 sequences at a time: 8 tokens per 10 ms and engine, with no break.
    engine = EngineTimes(decode_step_s=0.01, max_concurrent=8)
    shape = scenario(max_staleness=1, engine=engine, num_engines=2)
    said = play(shape, turns="fixed:1", reply_tokens="fixed:20", waits_s="fixed:0")
    assert said.tokens_per_s == pytest.approx(2 * 8 / 0.01, rel=0.02)
    assert said.engine_idle_fraction < 0.02


@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_bound_holds_and_more_of_it_is_never_slower(rule, bound):
    shape = scenario(max_staleness=bound, rule=rule, step_s=0.2, publish_s=0.1, num_engines=2)
    said = play(shape)
    assert said.staleness_max <= bound
    assert sum(said.staleness_fractions.values()) == pytest.approx(1.0)
    assert (said.masked_fraction > 0) <= (rule == "mask" and bound > 0)
    assert (said.dropped_fraction > 0) <= (bound > 0)
    if rule != "drop":
        synchronous = play(replace(shape, max_staleness=0))
        assert said.steps_per_s >= 0.95 * synchronous.steps_per_s


def test_reports_are_as_far_apart_as_given():
    shape = scenario(max_staleness=0, report_s=3.0)
    said = play(shape, turns="fixed:1", reply_tokens="fixed:1", waits_s="fixed:0")
    assert 1 / said.steps_per_s >= 3.0


def test_a_recomputed_context_costs_after_every_swap():
    times = EngineTimes(decode_step_s=0.001, prefill_s_per_token=0.001)
    shape = scenario(max_staleness=4, engine=times, prompt_tokens=100)
    kept = replace(shape.costs, engine=replace(times, recomputes_kv=False))
    assert play(replace(shape, costs=kept)).tokens_per_s > 1.2 * play(shape).tokens_per_s


def test_another_rule_may_be_applied_to_the_batches_and_each_is_shown():
    shape = scenario(max_staleness=1, step_s=0.2, publish_s=0.1, num_engines=2)
    episodes = DrawnEpisodes(**HEAVY)
    nothing = StalenessRule(name="mask", max_staleness=1000, groups_per_step=4)
    oldest: list[int] = []

    def look(batch: SampledBatch) -> None:
        oldest.append(batch.train_version - min(g.group.min_policy_version for g in batch.groups))

    said = Simulation(shape, episodes, rule=nothing, on_batch=look).run()
    assert len(oldest) == 45
    assert said.staleness_max > 1 and max(oldest) >= said.staleness_max
    assert said.masked_fraction == said.lost_generation_fraction == 0.0


def test_what_a_bound_loses_is_forecast():
    shape = scenario(max_staleness=1, step_s=0.2, publish_s=0.1, num_engines=2)
    masked, dropped = play(shape), play(replace(shape, rule="drop"))
    assert masked.lost_generation_fraction > 0 and masked.masked_fraction > 0
    assert dropped.lost_generation_fraction > masked.lost_generation_fraction
    assert dropped.lost_over_kept_length is not None and dropped.lost_over_kept_length > 1
    synchronous = play(replace(shape, max_staleness=0))
    assert synchronous.lost_generation_fraction == 0
    assert synchronous.lost_over_kept_length is None


def test_the_same_scenario_gives_the_same_forecast():
    shape = scenario(max_staleness=2, step_s=0.3)
    assert play(shape) == play(shape)
    assert play(shape) != play(shape, seed=1)


def test_a_scenario_that_never_ends_is_given_up():
    with pytest.raises(Stuck, match="after 101 events at version 0 of 45"):
        play(scenario(max_events=100))


def test_recorded_episodes_are_played_as_they_were():
    long = Episode(reply_tokens=(30, 30), waits_s=(0.0, 1.0), first_wait_s=0.4)
    episodes = RecordedEpisodes([long])
    assert (episodes.mean_tokens, episodes.mean_turns) == (60, 2)
    said = Simulation(scenario(max_staleness=0), episodes).run()
    assert 1 / said.steps_per_s == pytest.approx(0.4 + 0.6 + 1.0)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="one wait per reply"):
        Episode(reply_tokens=(3,), waits_s=())
    with pytest.raises(ValueError, match="no episode was recorded"):
        RecordedEpisodes([])
    with pytest.raises(ValueError, match="num_engines must be >= 1 and finite, got 0"):
        Scenario(num_engines=0)
    with pytest.raises(ValueError, match="max_staleness must be >= 0"):
        Scenario(max_staleness=-1)
    with pytest.raises(ValueError, match=r"times must be finite and >= 0, got -1\.0 for publish_s"):
        Costs(publish_s=-1.0)
    with pytest.raises(ValueError, match=r"publish_spread must be in 0\.\.1, got 2"):
        Costs(publish_spread=2)
    with pytest.raises(ValueError, match="prompt_tokens must be >= 0 and finite, got nan"):
        Scenario(prompt_tokens=float("nan"))
    with pytest.raises(ValueError, match="rule pace uses every group once"):
        Scenario(rule="pace", max_times_sampled=2)
    with pytest.raises(ValueError, match="max_tokens must be >= 1, got 0"):
        DrawnEpisodes(reply_tokens="fixed:3", max_tokens=0)
