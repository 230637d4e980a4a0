from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.checkpointing import CheckpointStore
from skyrl_async.coordination.coordinator import (
    MAX_SKIPPED_STEPS,
    Coordinator,
    CoordinatorSettings,
    WorkerFailed,
)
from skyrl_async.coordination.filters import FilterSettings
from skyrl_async.coordination.guard import CollapseGuard, GuardSettings
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.run_state import RunState
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.environments.tasks import TaskSource, heldout_tasks
from skyrl_async.metrics.recorder import Recorder
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import Assignment, DroppedGroup, DropReason
from tests.fakes import (
    Event,
    FakeClock,
    FakeLearner,
    FakeRolloutWorker,
    ListSink,
    two_member_group,
)

DEADLINE_S = 10.0
BATCH = 2
LARGEST_GROUP_BYTES = 2000
HELDOUT = heldout_tasks("number_guess", 3)
NAMES = ("rollout actor 0", "rollout actor 1")


@dataclass
class Run:
    coordinator: Coordinator
    ledger: GroupLedger
    workers: tuple[FakeRolloutWorker, ...]
    learner: FakeLearner
    metrics: RunMetrics
    lines: list[dict[str, Any]]
    events: list[Event]

    def place(self, *event: Any) -> int:
        """Return when an event happened, which is a mistake if it did not happen once."""
        assert self.events.count(event) == 1, event
        return self.events.index(event)

    def happened(self, kind: str) -> list[Event]:
        return [event for event in self.events if event[0] == kind]


def make_run(
    *,
    bound: int = 2,
    steps: int = 3,
    workers: Sequence[dict[str, Any]] = ({}, {}),
    learner: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    guard: GuardSettings | None = None,
    filters: FilterSettings | None = None,
    checkpoints: CheckpointStore | None = None,
    start: RunState | None = None,
    **settings: Any,
) -> Run:
    events: list[Event] = []
    fakes = tuple(
        FakeRolloutWorker(name, events, **options)
        for name, options in zip(NAMES, workers, strict=False)
    )
    fake_learner = FakeLearner(
        fakes, events, groups_per_step=BATCH, max_staleness=bound, **(learner or {})
    )
    rule = StalenessRule(name="mask", max_staleness=bound, groups_per_step=BATCH)
    ledger = GroupLedger(
        rule=rule,
        admission=Admission(
            groups_per_step=BATCH,
            max_staleness=bound,
            largest_group_bytes=LARGEST_GROUP_BYTES,
            capacity_bytes=100 * LARGEST_GROUP_BYTES,
            live_version=start.policy_version if start else 0,
        ),
        buffer=ReplayBuffer(
            groups_per_step=BATCH,
            rule=rule,
        ),
        state=start.ledger_state() if start else None,
    )
    sink = ListSink()
    metrics = RunMetrics(
        Recorder([sink], clock=clock), clock=clock, state=start.metrics if start else None
    )
    tasks = TaskSource("number_guess", seed=0)
    if start is not None:
        tasks.restore(start.tasks)
        fake_learner.version = start.policy_version
    coordinator = Coordinator(
        tasks=tasks,
        groups=ledger,
        rollouts={worker.name: worker for worker in fakes},
        learner=fake_learner,
        metrics=metrics,
        settings=CoordinatorSettings(
            steps=steps, **({"poll_wait_s": 2 * DEADLINE_S, "evaluation_tasks": ()} | settings)
        ),
        clock=clock,
        guard=CollapseGuard(guard) if guard is not None else None,
        filters=filters,
        checkpoints=checkpoints,
        start=start,
    )
    return Run(coordinator, ledger, fakes, fake_learner, metrics, sink.lines, events)


async def until_over(run: Run) -> None:
    """Run to the end, however that comes; nothing may go on afterwards."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            await run.coordinator.run()
    finally:
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not run.learner.stepping and not any(worker.polling for worker in run.workers)


def go(run: Run) -> Run:
    asyncio.run(until_over(run))
    return run


def failure(run: Run) -> str:
    with pytest.raises(WorkerFailed) as caught:
        go(run)
    return str(caught.value)


def dropped(assignment: Assignment, version: int = 0) -> DroppedGroup:
    return DroppedGroup(
        group_id=assignment.group_id,
        reason=DropReason.ENVIRONMENT_ERROR,
        detail=f"boom {assignment.group_id}",
    )


def never_finished(assignment: Assignment, version: int) -> None:
    return None


async def forever(*_: Any) -> Any:
    await asyncio.Event().wait()


def raising(error: Exception) -> Callable:
    async def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


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


def test_evaluates_every_so_many_steps_and_the_last_version():
    async def reward(version):
        return version / 10

    run = go(
        make_run(
            bound=0,
            steps=7,
            workers=[{"evaluate": reward, "polls_before_live": 2}, {"polls_before_live": 4}],
            evaluation_every_steps=3,
            evaluation_tasks=HELDOUT,
        )
    )

    versions = [version for _, _, version in run.happened("evaluate")]
    # A due evaluation plays what the engine has: the version before, if the new one is on its way.
    assert versions == [2, 5, 7]
    assert run.place("trained", 3) < run.place("evaluate", NAMES[0], 2) < run.place("trained", 4)
    assert run.place("live", NAMES[1], 7) < run.place("evaluate", NAMES[0], 7)
    assert run.metrics.summary()["eval_reward_final"] == 0.7
    assert run.metrics.summary()["eval_policy_version"] == 7
    assert run.lines[3]["eval/reward_mean"] == 0.2, "written with the step after it"


def test_without_a_period_only_the_last_version_is_evaluated():
    async def reward(version):
        return 0.5

    run = go(make_run(steps=4, workers=[{"evaluate": reward}], evaluation_tasks=HELDOUT))

    assert run.happened("evaluate") == [("evaluate", NAMES[0], 4)]


def test_training_goes_on_during_an_evaluation():
    """The first evaluation ends after the last step; those that are due meanwhile are left out."""

    async def body():
        third_step = asyncio.Event()
        evaluating: list[int] = []

        async def during(step):
            if step == 3:
                third_step.set()

        async def reward(version):
            evaluating.append(version)
            assert len(evaluating) == 1, "one evaluation at a time"
            await third_step.wait()
            for _ in range(100):  # until the training would be over
                await asyncio.sleep(0)
            evaluating.remove(version)
            return 0.5

        run = make_run(
            steps=3,
            workers=[{"evaluate": reward}],
            learner={"during": during},
            evaluation_every_steps=1,
            evaluation_tasks=HELDOUT,
        )
        await until_over(run)
        return run

    run = asyncio.run(body())

    (_, _, first), (_, _, last) = run.happened("evaluate")
    assert run.place("evaluate", NAMES[0], first) < run.place("step", 2)
    assert (run.learner.steps, last) == (3, 3)


def test_reaching_the_reward_of_an_evaluation_ends_the_run():
    async def reward(version):
        return version / 10

    run = go(
        make_run(
            bound=0,
            steps=50,
            workers=[{"evaluate": reward}],
            evaluation_every_steps=2,
            evaluation_tasks=HELDOUT,
            stop_at_eval_reward=0.3,
        )
    )

    assert 4 <= run.learner.steps <= 6
    assert run.metrics.summary()["eval_reward_final"] >= 0.3
    reached = [version for _, _, version in run.happened("evaluate")]
    assert all(version < 3 for version in reached[:-1]), (
        "the evaluation that reached it is the last"
    )


def test_reaching_the_reward_ends_the_wait_for_a_batch():
    """The evaluation ends when nothing else can happen: no group in flight ever finishes."""

    async def body():
        async def reward(version):
            while run.ledger.counts().in_flight < 3 * BATCH or not run.workers[0].polling:
                await asyncio.sleep(0)
            for _ in range(10):  # the train loop looks at the last report, and waits again
                await asyncio.sleep(0)
            return 1.0

        def finish(assignment, version):
            return two_member_group(assignment, version) if assignment.group_id < BATCH else None

        run = make_run(
            bound=2,
            steps=50,
            workers=[{"evaluate": reward, "finish": finish}],
            evaluation_every_steps=1,
            evaluation_tasks=HELDOUT,
            stop_at_eval_reward=1.0,
        )
        await until_over(run)
        return run

    run = asyncio.run(body())

    assert run.learner.steps == 1 and len(run.happened("evaluate")) == 1


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (raising(RuntimeError("no memory")), f"{NAMES[0]}: no memory"),
        (forever, f"{NAMES[0]}: waited 0.02 s for an evaluation"),
    ],
)
def test_failed_evaluation_ends_the_run_under_the_name_of_its_worker(every, evaluate, expected):
    run = make_run(
        steps=4,
        workers=[{"evaluate": evaluate}],
        evaluation_every_steps=every,
        evaluation_tasks=HELDOUT,
        evaluation_timeout_s=0.02,
    )

    assert failure(run) == expected


def test_evaluation_that_fails_beside_the_training_is_not_forgotten():
    evaluations = []

    async def fail_once(version):
        evaluations.append(version)
        if len(evaluations) == 1:
            raise RuntimeError("no memory")
        return 0.5

    run = make_run(
        steps=20,
        workers=[{"evaluate": fail_once}],
        evaluation_every_steps=2,
        evaluation_tasks=HELDOUT,
    )

    assert failure(run) == f"{NAMES[0]}: no memory"
    assert len(evaluations) == 1 and run.learner.steps < 20


def test_last_weights_that_never_become_live_end_the_run():
    run = make_run(
        bound=5,
        steps=2,
        workers=[{"evaluate": raising(AssertionError)}, {"polls_before_live": 10**9}],
        evaluation_tasks=HELDOUT,
        answer_timeout_s=0.02,
    )

    assert failure(run) == "training: waited 0.02 s for the last weights to become live"


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
