from __future__ import annotations

import asyncio
import re

import pytest

from skyrl_async.coordination.coordinator import (
    MAX_SKIPPED_STEPS,
)
from skyrl_async.coordination.guard import GuardSettings
from skyrl_async.types import DropReason
from tests.coordination.coordinator_runs import (
    BATCH,
    NAMES,
    Run,
    dropped,
    failure,
    forever,
    go,
    make_run,
    never_finished,
    raising,
)
from tests.fakes import FakeClock, two_member_group


@pytest.mark.parametrize("name", NAMES)
def test_worker_whose_poll_fails_ends_the_run_under_its_name(name):
    run = make_run()
    run.workers[NAMES.index(name)].on_poll = raising(RuntimeError("the engine died"))

    assert failure(run) == f"{name}: the engine died"


@pytest.mark.parametrize("during_training", [False, True])
def test_worker_that_refuses_tasks_is_named_whoever_gave_them(during_training):
    """In training, the loop of the actor that is the last to swap hands out the new tasks."""
    run = make_run(bound=0, workers=[{"polls_before_live": 3}, {}])
    broken = run.workers[1]

    async def refuse():
        if run.learner.steps or not during_training:
            raise RuntimeError("out of memory")

    broken.on_submit = refuse

    assert failure(run) == f"{NAMES[1]}: out of memory"


def test_error_without_text_is_named_by_its_type():
    run = make_run()
    run.workers[0].on_poll = raising(ConnectionResetError())

    assert failure(run) == f"{NAMES[0]}: ConnectionResetError()"


def test_failure_of_the_learner_ends_the_run():
    run = make_run(learner={"during": raising(RuntimeError("no memory"))})

    assert failure(run) == "learner: no memory"


@pytest.mark.parametrize(
    ("hangs", "settings", "expected"),
    [
        (
            "on_poll",
            {"answer_timeout_s": 0.02, "poll_wait_s": 0.01},
            f"{NAMES[1]}: waited 0.03 s for a report",
        ),
        (
            "on_submit",
            {"answer_timeout_s": 0.02},
            f"{NAMES[1]}: waited 0.02 s for new tasks to be taken",
        ),
        ("step", {"step_timeout_s": 0.02}, "learner: waited 0.02 s for a step"),
    ],
)
def test_part_that_does_not_answer_ends_the_run(hangs, settings, expected):
    run = make_run(learner={"during": forever} if hangs == "step" else {}, **settings)
    if hangs != "step":
        setattr(run.workers[1], hangs, forever)

    assert failure(run) == expected


def test_stall_is_reported_with_the_state_of_all_groups():
    run = make_run(
        bound=1,
        workers=[{"finish": lambda a, v: None if a.group_id else two_member_group(a, v)}],
        stall_timeout_s=0.02,
    )

    message = failure(run)

    assert message.startswith("training: no batch for 0.02 s: ")
    assert re.search(r"in_flight=3, buffered=1, leased=0.*live version 0 of 0$", message)


def test_failed_groups_in_a_row_end_the_run_with_the_last_cause():
    run = make_run(workers=[{"finish": dropped}], max_failed_groups=5)

    assert failure(run) == (
        f"{NAMES[0]}: the last 5 groups all failed, the newest with environment_error: boom 4"
    )


def test_a_success_between_failed_groups_lets_the_run_go_on():
    def finish(assignment, version):
        make = two_member_group if assignment.group_id % 5 == 4 else dropped
        return make(assignment, version)

    run = go(make_run(steps=4, workers=[{"finish": finish}], max_failed_groups=5))

    assert run.learner.steps == 4
    assert run.ledger.counts().dropped[DropReason.ENVIRONMENT_ERROR] > 5


def test_skipped_step_counts_as_a_step_but_makes_no_version():
    run = go(make_run(steps=5, bound=0, learner={"skip": lambda step: step in (2, 4)}))

    assert (run.learner.steps, run.learner.version) == (5, 3)
    assert [line["policy_version"] for line in run.lines] == [1, 1, 2, 2, 3]
    assert [line["learner/skipped_steps"] for line in run.lines] == [0, 1, 0, 1, 0]
    summary = run.metrics.summary()
    assert (summary["steps"], summary["skipped_steps"]) == (5, 2)
    assert summary["dropped"] == {"nonfinite_update": 2 * BATCH}
    assert summary["trajectories_trained"] == 3 * 2 * BATCH


def test_ten_skipped_steps_in_a_row_end_the_run():
    run = make_run(steps=50, learner={"skip": lambda step: step > 1})

    assert failure(run).startswith(
        "training: 10 learner steps in a row had a loss or gradient that was not finite"
    )
    assert run.learner.steps == 1 + MAX_SKIPPED_STEPS
    assert run.metrics.summary()["skipped_steps"] == MAX_SKIPPED_STEPS


def test_a_guard_rolls_back_before_skipped_steps_end_the_run():
    """Weights that make nothing but NaN are healed by nothing else."""
    run: Run = make_run(
        steps=50,
        guard=GuardSettings(patience_steps=3),
        learner={"skip": lambda step: step > 1 and not run.happened("rolled back")},
    )
    go(run)
    assert run.metrics.summary()["skipped_steps"] == 12, "patience for each of four actions"
    assert run.metrics.summary()["guard_actions"]["rollback"] == 1
    assert run.learner.version == 50 - 12 + 1


def test_skipped_steps_that_a_rollback_does_not_heal_end_the_run():
    run = make_run(steps=50, guard=GuardSettings(patience_steps=3), learner={"skip": bool})

    assert "22 learner steps in a row" in failure(run)


def test_nine_skipped_steps_in_a_row_are_survived():
    go(make_run(steps=30, learner={"skip": lambda step: step % MAX_SKIPPED_STEPS != 0}))


def test_time_limit_ends_the_run_even_if_batches_are_always_ready():
    clock = FakeClock()

    async def ten_seconds(step):
        await asyncio.sleep(0)
        clock.now += 10

    run = go(make_run(steps=50, clock=clock, max_seconds=25, learner={"during": ten_seconds}))

    assert run.learner.steps == 3
    assert run.metrics.summary()["seconds"] == 30


def test_time_limit_ends_the_wait_for_a_batch():
    run = go(make_run(max_seconds=0.02, workers=[{"finish": never_finished}]))

    assert run.learner.steps == 0 and run.metrics.summary()["steps"] == 0
