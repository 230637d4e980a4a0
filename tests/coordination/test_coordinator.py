from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from skyrl_async.coordination.filters import FilterSettings
from skyrl_async.coordination.guard import GuardSettings
from skyrl_async.metrics.trace import open_tracer
from skyrl_async.timeline.reader import read_trace
from skyrl_async.types import DropReason
from tests.coordination.coordinator_runs import (
    BATCH,
    DEADLINE_S,
    HELDOUT,
    NAMES,
    dropped,
    forever,
    go,
    make_run,
    until_over,
)
from tests.fakes import two_member_group


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
@pytest.mark.parametrize("steps", [1, 7])
def test_trains_exactly_the_steps_that_were_asked_for(bound, steps):
    run = go(make_run(bound=bound, steps=steps))

    assert run.learner.steps == run.learner.version == steps
    assert [line["step"] for line in run.lines] == list(range(1, steps + 1))
    assert [line["policy_version"] for line in run.lines] == list(range(1, steps + 1))
    summary = run.metrics.summary()
    assert summary["trajectories_trained"] == 2 * BATCH * steps
    assert summary["staleness_observed_max"] <= bound
    assert run.ledger.counts().consumed == BATCH * steps
    assert run.ledger.counts().leased == 0


def test_without_staleness_no_group_starts_before_the_last_step_is_live_everywhere():
    run = go(make_run(bound=0, steps=4, workers=[{}, {"polls_before_live": 3}]))

    admitted = sorted(group_id for _, _, group_id in run.happened("submit"))
    assert admitted[: 4 * BATCH] == list(range(4 * BATCH))
    for version in range(1, 4):
        live = max(run.place("live", name, version) for name in NAMES)
        assert run.place("trained", version) < live
        names = {g: name for _, name, g in run.happened("submit")}
        for group_id in range(version * BATCH, (version + 1) * BATCH):
            assert live < run.place("submit", names[group_id], group_id)
        assert run.place("live", NAMES[0], version) < run.place("live", NAMES[1], version)
    assert run.metrics.summary()["staleness_observed_max"] == 0


def test_generation_goes_on_during_a_step():
    """The first step ends only after all other admitted groups were played and reported."""
    bound = 2
    groups = (bound + 1) * BATCH

    async def body():
        all_reported = asyncio.Event()

        async def during(step):
            if step == 1:
                await all_reported.wait()

        def finish(assignment, version):
            if assignment.group_id == groups - 1:
                all_reported.set()
            return two_member_group(assignment, version)

        run = make_run(
            bound=bound,
            workers=[{"finish": finish}, {"finish": finish}],
            learner={"during": during},
        )
        await until_over(run)
        return run

    run = asyncio.run(body())

    names = {g: name for _, name, g in run.happened("submit")}
    last = run.place("report", names[groups - 1], groups - 1)
    assert run.place("step", 0) < last < run.place("trained", 1)
    # Slots, not the learner, bound how far generation runs ahead.
    assert run.place("trained", 1) < run.place("submit", names[groups], groups)
    assert run.metrics.summary()["staleness_observed_max"] == bound


def test_groups_go_to_the_actor_that_plays_fewest():
    run = go(make_run(bound=2, steps=1))

    first = [name for _, name, group_id in run.happened("submit") if group_id < 6]
    assert sorted(first) == [NAMES[0]] * 3 + [NAMES[1]] * 3


def test_no_actor_plays_more_groups_than_it_may():
    run = go(make_run(bound=5, steps=6, max_groups_per_actor=2))

    assert run.learner.steps == 6
    assert [worker.most_in_flight for worker in run.workers] == [2, 2]


def test_every_group_plays_another_task():
    tasks: dict[int, str] = {}

    def finish(assignment, version):
        tasks[assignment.group_id] = assignment.task.task_id
        return two_member_group(assignment, version)

    go(make_run(workers=[{"finish": finish}], steps=4))

    assert tasks == {group_id: f"number_guess/train/{group_id}" for group_id in tasks}


def test_slots_of_dropped_groups_are_used_again():
    def finish(assignment, version):
        make = dropped if assignment.group_id % 3 == 0 else two_member_group
        return make(assignment, version)

    run = go(make_run(bound=0, steps=5, workers=[{"finish": finish}]))

    assert run.learner.steps == 5
    assert run.workers[0].most_in_flight == BATCH
    num_dropped = run.ledger.counts().dropped[DropReason.ENVIRONMENT_ERROR]
    assert num_dropped >= 5
    assert run.metrics.summary()["dropped"] == {"environment_error": num_dropped}


def test_slot_of_a_group_that_went_stale_is_used_at_once():
    """Group 3 ends too late for step 2; groups 6 and 7 only end when group 8 has its slot."""

    def finish(assignment, version):
        group_id = assignment.group_id
        if group_id == 3:
            return two_member_group(assignment, 0) if version == 2 else None
        if group_id in (6, 7) and 8 not in run.workers[0].in_flight:
            return None
        return two_member_group(assignment, version)

    run = make_run(bound=1, steps=3, workers=[{"finish": finish}])
    go(run)

    assert run.learner.steps == 3
    assert run.ledger.counts().dropped == {DropReason.STALE: 1}
    assert run.metrics.summary()["dropped"] == {"stale": 1}


@pytest.mark.parametrize("while_", ["waiting", "stepping", "evaluating", "evaluating beside"])
def test_cancelled_run_ends_all_loops(while_):
    async def body():
        reached = asyncio.Event()

        async def hang(*_):
            reached.set()
            await forever()

        def finish(assignment, version):
            if while_ == "waiting":
                reached.set()
                return None
            if while_ == "evaluating beside" and assignment.group_id >= BATCH:
                return None
            return two_member_group(assignment, version)

        run = make_run(
            workers=[{"finish": finish, "evaluate": hang}, {"finish": finish}],
            learner={"during": hang} if while_ == "stepping" else {},
            evaluation_every_steps=int(while_ == "evaluating beside"),
            evaluation_tasks=HELDOUT if while_.startswith("evaluating") else (),
        )
        running = asyncio.create_task(run.coordinator.run())
        async with asyncio.timeout(DEADLINE_S):
            await reached.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not run.learner.stepping and not any(worker.polling for worker in run.workers)

    asyncio.run(body())


def test_import_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, skyrl_async.coordination.coordinator;"
        "print([m for m in ('torch', 'ray', 'transformers', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_rejected_group_frees_its_slot_and_batches_stay_full():
    """All groups pass, which is too easy; one in three is kept nevertheless."""
    easy = FilterSettings(max_pass_rate=0.5, pass_reward=-1.0, max_rejected_in_a_row=2)
    run = go(make_run(steps=3, filters=easy))
    assert run.metrics.summary()["steps"] == 3
    assert run.metrics.summary()["dropped"]["pass_rate"] >= 2 * BATCH * 3
    assert run.ledger.counts().dropped[DropReason.PASS_RATE] >= 2 * BATCH * 3


def test_the_guard_acts_in_order_and_a_rollback_makes_a_new_version_without_old_groups():
    guard = GuardSettings(max_kl=1.0, patience_steps=2, max_reward_drop=None)
    sick = {"offpolicy/kl_behavior": 5.0}
    run = make_run(
        steps=9,
        bound=4,
        guard=guard,
        learner={"report": lambda step: sick if step <= 8 else {"offpolicy/kl_behavior": 0.0}},
    )
    go(run)
    assert run.metrics.summary()["guard_actions"] == {
        "warn": 1,
        "tighten": 1,
        "lower_rate": 1,
        "rollback": 1,
    }
    assert run.ledger.max_staleness == 2
    assert run.learner.rate == 0.5
    (rolled_back,) = run.happened("rolled back")
    assert rolled_back == ("rolled back", 0, 9)
    assert run.learner.version == 10, "nine steps and one rollback, each a version"
    dropped_groups = run.ledger.counts().dropped
    assert dropped_groups[DropReason.ROLLBACK] >= 1


@pytest.mark.parametrize("bound", [2, 4, 8])
@pytest.mark.parametrize("rule", ["mask", "drop", "pace"])
def test_a_run_goes_on_after_the_guard_has_lowered_its_bound(rule, bound):
    """Groups that were admitted for the larger one must not stop it."""
    sick = {"offpolicy/kl_behavior": 5.0}
    run = make_run(
        steps=20,
        bound=bound,
        rule=rule,
        guard=GuardSettings(patience_steps=1, max_reward_drop=None),
        learner={"report": lambda step: sick if step <= 16 else {}},
        stall_timeout_s=5.0,
    )
    go(run)
    assert run.learner.steps == 20
    assert run.ledger.max_staleness < bound


def test_the_timeline_says_what_training_waits_for(tmp_path):
    tracer = open_tracer(tmp_path, process="coordinator")

    async def reward(version):
        return 0.5

    workers = [{"evaluate": reward}, {}]
    go(make_run(steps=2, workers=workers, tracer=tracer, evaluation_tasks=HELDOUT))
    tracer.close()
    training, evaluation = read_trace(tmp_path).lanes
    assert (training.role, training.name) == ("coordinator", "training")
    each_step = ["wait for a batch", "learner step", "finish the step", "checkpoint and admit"]
    assert [span.name for span in training.spans] == [*each_step * 2, "end of the run"]
    assert sum(moment.args["groups"] for moment in training.instants) >= 2 * BATCH
    steps = [span for span in training.spans if span.name == "learner step"]
    assert [span.args for span in steps] == [
        {"train_version": version, "groups": BATCH} for version in (0, 1)
    ]
    for before, after in pairwise(training.spans):
        assert before.end_s <= after.start_s
    assert [span.name for span in evaluation.spans] == ["evaluation"]
