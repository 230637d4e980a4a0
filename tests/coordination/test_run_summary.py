from __future__ import annotations

import json

import pytest

from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.staleness import StalenessCost
from skyrl_async.metrics.recorder import Recorder
from skyrl_async.types import (
    DroppedGroup,
    DropReason,
    EvaluationResult,
)
from tests.coordination.run_metrics_world import World, group, report


@pytest.fixture
def world() -> World:
    return World()


def test_summary_holds_the_totals_of_the_run(world):
    for step in range(15):
        world.metrics.rollout_report(report(group(float(step), step + 1.0), generated_tokens=12.0))
        world.step(group(1.0, 0.0, 0.5), staleness={step % 4: 5})
    world.metrics.rollout_report(report(generated_tokens=3.0))
    for version, reward in ((3, 0.25), (15, 0.75)):
        world.metrics.evaluated(
            EvaluationResult(
                policy_version=version, mean_reward=reward, num_tasks=4, num_failures=0
            )
        )
    world.clock.now += 5

    assert world.metrics.summary() == {
        "steps": 15,
        "skipped_steps": 0,
        "seconds": 155.0,
        "seconds_to_first_step": 10.0,
        "reward_final": 14.0,  # the last tenth of 15 steps, rounded up: rewards 13.5 and 14.5
        "eval_reward_final": 0.75,
        "eval_policy_version": 15,
        "trajectories_trained": 45,
        "tokens_trained": 75,
        "tokens_generated": 183,
        "staleness_observed_max": 3,
        "dropped": {},
        "guard_actions": {},
        "failed_members": {},
        "idle": {
            "actor": {"generate": 0.75, "environment": 0.25, "wait_group": 0.0},
            "engine": {"generate": 0.5, "swap": 0.25, "wait_episodes": 0.25, "idle": 0.0},
        },
    }


def test_summary_of_a_run_without_a_step(world):
    world.clock.now += 2

    summary = world.metrics.summary()

    assert (summary["steps"], summary["seconds"], summary["dropped"]) == (0, 2.0, {})
    assert summary["reward_final"] is None and summary["eval_reward_final"] is None
    assert summary["seconds_to_first_step"] is None


def test_totals_of_a_run_that_goes_on_are_those_of_one_that_never_stopped():
    """The same reports and steps, once in one process and once in two."""

    def first_half(world: World) -> None:
        world.metrics.rollout_report(report(group(1.0, 0.0, failures=(DropReason.STEP_TIMEOUT,))))
        world.metrics.dropped([DroppedGroup(group_id=9, reason=DropReason.ZERO_VARIANCE)])
        world.metrics.guarded("warn")
        world.step(group(1.0, 0.0), staleness={0: 3, 2: 1}, cost=StalenessCost(lost_tokens=4))
        world.metrics.evaluated(
            EvaluationResult(policy_version=1, mean_reward=0.5, num_tasks=3, num_failures=1)
        )
        world.step(group(1.0), skipped=True)

    def second_half(world: World) -> None:
        world.metrics.rollout_report(report(group(0.5), generated_tokens=8.0))
        world.step(group(0.5), staleness={1: 2}, cost=StalenessCost(kept_tokens=12))

    whole = World()
    first_half(whole)
    second_half(whole)

    before = World()
    first_half(before)
    state = json.loads(json.dumps(before.metrics.state(), allow_nan=False))
    after = World()
    after.clock.now = 9e6
    after.metrics = RunMetrics(
        Recorder([after.sink], clock=after.clock), clock=after.clock, state=state
    )
    after.steps = 2
    assert after.metrics.steps == 2
    second_half(after)

    assert after.metrics.summary() == whole.metrics.summary()
    assert after.metrics.state() == whole.metrics.state()
    name = "staleness/lost_generation_fraction"
    assert after.sink.lines[-1][name] == whole.sink.lines[-1][name] == 4 / 16


def test_totals_of_another_form_are_refused():
    world = World()
    state = world.metrics.state()
    del state["tokens_trained"]
    with pytest.raises(ValueError, match="another form"):
        RunMetrics(Recorder([]), clock=world.clock, state=state)
