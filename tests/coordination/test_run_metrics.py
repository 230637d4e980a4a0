from __future__ import annotations

import pytest

from skyrl_async.coordination.engine_fleet import EngineReport
from skyrl_async.coordination.staleness import StalenessCost
from skyrl_async.metrics.names import find
from skyrl_async.types import (
    DepartedGroup,
    DroppedGroup,
    DropReason,
    EvaluationResult,
    GroupFate,
    RolloutReport,
    StoredGroup,
)
from tests.coordination.run_metrics_world import World, group, report


@pytest.fixture
def world() -> World:
    return World()


LEARNER_METRICS = {
    "optimizer_steps": 2.0,
    "loss/policy": -0.5,
    "policy/entropy": 1.5,
    "policy/grad_norm": 0.7,
    "policy/lr": 1e-3,
    "offpolicy/ess_fraction": 0.9,
    "offpolicy/clip_fraction": 0.1,
    "sync/bytes": 4096.0,
    "sync/transfer_s": 0.01,
    "sync/versions_skipped": 0.0,
    "idle/learner/wait_fraction": 0.25,
    "idle/learner/train_fraction": 0.75,
}


def test_a_step_writes_the_names_of_the_table_with_their_values(world):
    world.metrics.rollout_report(report(group(1.0, 3.0), generated_tokens=40.0))
    world.metrics.rollout_report(
        report(
            group(0.0, 0.0, tokens=4, turns=2),
            generated_tokens=60.0,
            reprefilled_tokens=7.0,
            swap_stall_s=0.5,
        )
    )
    world.metrics.departed(
        [DepartedGroup(stored=stored(), fate=GroupFate.DROPPED, reason=DropReason.STALE)]
    )
    cost = StalenessCost(
        lost_tokens=10,
        kept_tokens=30,
        lost_trajectories=1,
        lost_trajectory_tokens=10,
        kept_trajectories=6,
        kept_trajectory_tokens=30,
        masked_tokens=1,
        trained_tokens=9,
    )
    written = world.step(
        group(1.0, 3.0), staleness={0: 6, 2: 2}, cost=cost, metrics=LEARNER_METRICS
    )

    expected = {
        "step": 1,
        "policy_version": 1,
        "live_version": 0,
        "time_s": 10.0,
        "reward/mean": 1.0,
        "reward/std": 1.5**0.5,
        "reward/trained_mean": 2.0,
        "staleness/mean": 0.5,
        "staleness/p95": 2,
        "staleness/max": 2,
        "staleness/lost_generation_fraction": 0.25,
        "staleness/masked_fraction": 0.1,
        "staleness/lost_over_kept_length": 2.0,
        "throughput/generated_tokens_per_s": 10.0,
        "throughput/trained_tokens_per_s": 0.8,
        "throughput/trajectories_per_s": 0.4,
        "idle/actor/generate_fraction": 0.75,
        "idle/actor/environment_fraction": 0.25,
        "idle/actor/wait_group_fraction": 0.0,
        "idle/engine/generate_fraction": 0.5,
        "idle/engine/swap_fraction": 0.25,
        "idle/engine/wait_episodes_fraction": 0.25,
        "idle/engine/idle_fraction": 0.0,
        "sync/stall_s": 0.5,
        "sync/reprefilled_tokens": 7.0,
        "buffer/groups": 3,
        "buffer/bytes": 700,
        "dropped/stale": 1,
        **LEARNER_METRICS,
    }
    assert {name: written[name] for name in expected} == pytest.approx(expected)
    documented = {name for name in expected if find(name) is not None}
    assert documented == set(expected), "the names are those of the table"
    assert world.sink.lines == [{**written, "staleness/histogram": {0: 6, 2: 2}}]


def stored(**uses: int) -> StoredGroup:
    return StoredGroup(group=group(1.0, 0.0, tokens=3), **uses)


def test_further_values_of_a_report(world):
    world.metrics.rollout_report(report(group(1.0, 0.0, tokens=3, turns=2)))
    world.metrics.rollout_report(report(group(1.0, 0.0, tokens=2)))

    written = world.step(group(1.0, 0.0), staleness={0: 4})

    assert written["rollout/generated_tokens_mean"] == 4.0
    assert written["rollout/turns_mean"] == 1.5
    assert written["engine/longest_gap_s"] == 0.5
    assert written["engine/longest_gap_decode_steps"] == 3.0


def test_every_step_tells_of_its_own_interval(world):
    world.metrics.rollout_report(report(group(1.0, 1.0), generated_tokens=100.0))
    world.step(group(1.0, 1.0), staleness={1: 4})
    world.metrics.rollout_report(report(group(0.0, 0.0), generated_tokens=50.0))
    written = world.step(group(0.0, 1.0), staleness={0: 4})

    assert (written["reward/mean"], written["reward/trained_mean"]) == (0.0, 0.5)
    assert written["throughput/generated_tokens_per_s"] == 5.0
    assert (written["staleness/mean"], written["time_s"]) == (0.0, 20.0)


def test_losses_to_the_bound_are_those_since_the_start(world):
    world.step(
        group(1.0, 0.0),
        staleness={0: 4},
        cost=StalenessCost(lost_tokens=4, kept_tokens=4, masked_tokens=4, trained_tokens=4),
    )
    written = world.step(
        group(1.0, 0.0), staleness={0: 4}, cost=StalenessCost(kept_tokens=8, trained_tokens=8)
    )

    assert written["staleness/lost_generation_fraction"] == 0.25
    assert written["staleness/masked_fraction"] == 0.0, "of this step's batch"


def test_losses_in_the_interval_of_a_skipped_step_are_not_forgotten(world):
    world.step(group(1.0, 0.0), skipped=True, cost=StalenessCost(lost_tokens=4))
    written = world.step(
        group(1.0, 0.0), staleness={0: 4}, cost=StalenessCost(kept_tokens=4, trained_tokens=4)
    )

    assert written["staleness/lost_generation_fraction"] == 0.5


def test_groups_that_left_are_counted_by_reason(world):
    failed = DroppedGroup(
        group_id=1,
        reason=DropReason.TOO_FEW_MEMBERS,
        failures=(DropReason.STEP_TIMEOUT, DropReason.ENVIRONMENT_ERROR),
        num_generated_tokens=5,
    )
    partly = group(1.0, 0.0, failures=(DropReason.STEP_TIMEOUT,))
    world.metrics.rollout_report(report(failed, partly))
    world.metrics.dropped([failed])
    world.metrics.departed(
        [
            DepartedGroup(stored=stored(), fate=GroupFate.DROPPED, reason=DropReason.STALE),
            DepartedGroup(stored=stored(times_sampled=1, made_version=2), fate=GroupFate.RETIRED),
            DepartedGroup(stored=stored(times_sampled=1, made_version=2), fate=GroupFate.CONSUMED),
        ]
    )

    written = world.step(group(1.0, 0.0), staleness={0: 4})

    assert written["dropped/too_few_members"] == written["dropped/stale"] == 1
    assert written["dropped/generated_tokens"] == 5 + 6
    assert written["buffer/retired"] == 1
    assert world.step(group(1.0, 0.0), staleness={0: 4})["dropped/stale"] == 0
    summary = world.metrics.summary()
    assert summary["dropped"] == {"too_few_members": 1, "stale": 1}
    assert summary["failed_members"] == {"step_timeout": 2, "environment_error": 1}


def test_skipped_step_trains_nothing(world):
    written = world.step(group(1.0, 1.0), skipped=True, metrics={"optimizer_steps": 0.0})

    assert written["learner/skipped_steps"] == 1
    assert "reward/trained_mean" not in written and "staleness/mean" not in written
    summary = world.metrics.summary()
    assert (summary["steps"], summary["skipped_steps"]) == (1, 1)
    assert (summary["trajectories_trained"], summary["tokens_trained"]) == (0, 0)


def test_evaluation_is_written_with_the_next_step(world):
    assert world.metrics.last_evaluation is None
    result = EvaluationResult(policy_version=4, mean_reward=0.5, num_tasks=10, num_failures=2)
    world.metrics.evaluated(result)

    written = world.step(group(1.0, 0.0), staleness={0: 4})

    assert written["eval/reward_mean"] == 0.5
    assert (written["eval/policy_version"], written["eval/failures"]) == (4, 2)
    assert "eval/reward_mean" not in world.step(group(1.0, 0.0), staleness={0: 4})
    assert world.metrics.last_evaluation is result


def test_diverged_learner_is_written_as_missing_values(world):
    written = world.step(group(1.0, 0.0), metrics={"loss/policy": float("nan")})

    assert (written["loss/policy"], written["nonfinite_values"]) == (None, 1)


def test_seconds_of_a_checkpoint_are_written_once(world):
    world.metrics.checkpoint_written(0.25)
    assert world.step(group(1.0), staleness={0: 1})["checkpoint/save_s"] == 0.25
    assert "checkpoint/save_s" not in world.step(group(1.0), staleness={0: 1})
    assert find("checkpoint/save_s") is not None


def test_swaps_of_servers_are_taken_from_the_time_in_which_clients_saw_them_busy(world):
    def served(generate: float, idle: float) -> RolloutReport:
        seconds = {"generate": generate, "swap": 0.0, "wait_episodes": 0.0, "idle": idle}
        return RolloutReport(engine_version=1, groups=(), engine_seconds=seconds)

    # Two actors see the time of all four engines, of which one stood still for 4 s.
    stalled = EngineReport(
        endpoint=None, incarnation=0, connected=True, policy_version=1, counts={"stall_s": 4.0}
    )
    world.metrics.engine_report(stalled, share=2 / 4)
    world.metrics.rollout_report(served(1.5, 8.5))
    world.metrics.rollout_report(served(10.0, 0.0))
    row = world.step(group(1.0), staleness={0: 1})

    parts = {part: row[f"idle/engine/{part}_fraction"] for part in ("generate", "swap", "idle")}
    assert parts == pytest.approx({"generate": 9.5 / 20, "swap": 2 / 20, "idle": 8.5 / 20})
    assert row["sync/stall_s"] == 4.0


def test_a_step_whose_tokens_are_all_masked_is_told_once(world, caplog):
    with caplog.at_level("WARNING"):
        world.step(group(1.0), metrics={"learner/loss_tokens": 5.0})
        assert not caplog.messages
        for _ in range(2):
            world.step(group(1.0), metrics={"learner/loss_tokens": 0.0})
    (message,) = caplog.messages
    assert message.startswith("step 2 trained on no token: masks reject all of them")
