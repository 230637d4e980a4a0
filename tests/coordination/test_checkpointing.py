"""Checkpoints in the train loop: when, what holds while one is written, and what comes after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from skyrl_async.coordination.guard import CollapseGuard, GuardSettings
from skyrl_async.coordination.ledger import LedgerState
from skyrl_async.coordination.run_state import RunState, ledger_counts
from skyrl_async.types import DropReason
from tests.coordination.coordinator_runs import (
    BATCH,
    DEADLINE_S,
    HELDOUT,
    NAMES,
    Run,
    failure,
    forever,
    go,
    make_run,
    raising,
    until_over,
)
from tests.fakes import Event, FakeClock, two_member_group


class ListStore:
    """Keeps states as JSON; refuses calls that the real writer would not survive."""

    def __init__(
        self,
        *,
        writing: Callable[[int], Awaitable[None]] | None = None,
        beginning: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self.states: list[RunState] = []
        self.whole: list[int] = []
        self.events: list[Event] = []
        self._writing = writing
        self._beginning = beginning
        self._busy = False

    async def begin(self, state: RunState) -> None:
        assert not self._busy, "one at a time"
        self._busy = True
        if self._beginning is not None:
            await self._beginning(state.step)
        self.states.append(RunState.from_json(json.loads(json.dumps(state.to_json()))))
        self.events.append(("begun", state.step))

    async def finish(self) -> None:
        assert self._busy
        step = self.states[-1].step
        await (asyncio.sleep(0) if self._writing is None else self._writing(step))
        self._busy = False
        self.whole.append(step)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [1]), (3, [3]), (6, [3, 6]), (8, [3, 6, 8]), (9, [3, 6, 9])]
)
def test_every_few_steps_and_at_the_end(steps, expected):
    store = ListStore()
    go(make_run(steps=steps, checkpoints=store, checkpoint_every_steps=3))
    assert store.whole == [state.step for state in store.states] == expected
    assert [state.policy_version for state in store.states] == expected


def test_the_step_after_a_checkpoint_is_trained_meanwhile_but_counted_only_when_that_is_whole():
    async def body() -> Run:
        trained_further = asyncio.Event()

        async def during(step: int) -> None:
            if step == 3:
                trained_further.set()

        async def writing(step: int) -> None:
            if step == 2:
                await trained_further.wait()
                for _ in range(50):
                    await asyncio.sleep(0)
                assert len(run.lines) == 2, "step 3 is counted before the checkpoint is whole"

        store = ListStore(writing=writing)
        run = make_run(
            steps=5, checkpoints=store, checkpoint_every_steps=2, learner={"during": during}
        )
        await until_over(run)
        assert store.whole == [2, 4, 5]
        return run

    assert len(asyncio.run(body()).lines) == 5


def test_a_state_is_that_between_two_steps():
    store = ListStore()
    run = go(make_run(steps=4, bound=0, checkpoints=store, checkpoint_every_steps=2))
    first, last = store.states
    assert (first.step, first.policy_version) == (2, 2)
    assert first.metrics["steps"] == 2
    assert first.metrics["trajectories_trained"] == 2 * 2 * BATCH
    assert first.groups == {
        "next_group_id": 2 * BATCH,
        "consumed": 2 * BATCH,
        "retired": 0,
        "dropped": {},
    }
    assert first.tasks["index"] == 2 * BATCH
    assert last.metrics["trajectories_trained"] == 4 * 2 * BATCH
    assert run.metrics.summary()["trajectories_trained"] == 4 * 2 * BATCH


def test_failed_checkpoint_ends_the_run_under_its_name():
    full = raising(OSError("No space left on device"))
    for options in ({"beginning": full}, {"writing": full}):
        run = make_run(steps=50, checkpoints=ListStore(**options), checkpoint_every_steps=2)
        assert failure(run) == "checkpoint: No space left on device"
        assert run.metrics.summary()["steps"] == 2


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("beginning", "checkpoint: waited 0.02 s for the state of step 2 to be copied"),
        ("writing", "checkpoint: waited 0.02 s for step 2 to be written"),
    ],
)
def test_checkpoint_that_does_not_end_ends_the_run(part, expected):
    store = ListStore(**{part: forever})
    run = make_run(steps=50, checkpoints=store, checkpoint_every_steps=2, checkpoint_timeout_s=0.02)
    assert failure(run) == expected


def test_failure_of_the_last_checkpoint_is_not_forgotten():
    run = make_run(steps=3, checkpoints=ListStore(writing=raising(OSError("no"))))
    assert failure(run) == "checkpoint: no"


@pytest.mark.parametrize("where", ["stepping", "waiting for a batch"])
def test_stopped_run_ends_after_its_step_with_a_checkpoint_and_no_evaluation(where):
    async def body() -> tuple[Run, ListStore]:
        reached, go_on = asyncio.Event(), asyncio.Event()
        store = ListStore()

        async def during(step: int) -> None:
            if step == 3 and where == "stepping":
                reached.set()
                await go_on.wait()

        def finish(assignment, version):
            if where != "stepping" and assignment.group_id >= 2 * BATCH:
                reached.set()
                return None
            return two_member_group(assignment, version)

        run = make_run(
            steps=50,
            workers=[{"finish": finish, "evaluate": forever}],
            learner={"during": during},
            checkpoints=store,
            evaluation_tasks=HELDOUT,
        )
        running = asyncio.create_task(run.coordinator.run())
        async with asyncio.timeout(DEADLINE_S):
            await reached.wait()
            if where != "stepping":
                while run.learner.steps < 2 or run.learner.stepping:
                    await asyncio.sleep(0)
            run.coordinator.stop()
            go_on.set()
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return run, store

    run, store = asyncio.run(body())
    steps = 3 if where == "stepping" else 2
    assert store.whole == [steps]
    assert run.learner.steps == run.metrics.summary()["steps"] == steps
    assert not run.happened("evaluate")


def resumed(state: RunState, **options) -> Run:
    """Return a run that goes on, whose engines load its version only after some reports."""
    run = make_run(
        start=state, workers=[{"polls_before_live": 2}, {"polls_before_live": 5}], **options
    )
    for worker in run.workers:
        worker.publish(state.policy_version)
    return run


def test_resumed_run_goes_on_with_steps_versions_tasks_groups_and_totals():
    store = ListStore()
    first = go(make_run(steps=4, bound=1, checkpoints=store, checkpoint_every_steps=2))
    state = store.states[0]

    second = ListStore()
    run = go(resumed(state, steps=5, bound=1, checkpoints=second, checkpoint_every_steps=2))
    assert [line["step"] for line in run.lines] == [3, 4, 5]
    assert [line["policy_version"] for line in run.lines] == [3, 4, 5]
    summary = run.metrics.summary()
    assert (summary["steps"], summary["trajectories_trained"]) == (5, 5 * 2 * BATCH)
    assert summary["reward_final"] is not None
    # Only what was played after the resume is trained: two fakes start with no group in flight.
    groups = sorted(group_id for _, _, group_id in run.happened("submit"))
    assert groups[0] == state.groups["next_group_id"] > 0
    assert groups == list(range(groups[0], groups[0] + len(groups)))
    tasks = {run.workers[0].name: run.workers[0].in_flight, NAMES[1]: run.workers[1].in_flight}
    indices = [int(a.task.task_id.rpartition("/")[2]) for t in tasks.values() for a in t.values()]
    assert all(index >= state.tasks["index"] for index in indices)
    assert run.ledger.counts().consumed == 5 * BATCH
    assert second.whole == [4, 5]
    assert second.states[-1].metrics["seconds"] >= state.metrics["seconds"]
    assert first.metrics.summary()["steps"] == 4


def test_no_engine_plays_before_it_has_the_version_from_which_the_run_goes_on():
    store = ListStore()
    go(make_run(steps=2, checkpoints=store))
    run = go(resumed(store.states[0], steps=4))
    live = max(run.place("live", name, 2) for name in NAMES)
    assert live < min(i for i, event in enumerate(run.events) if event[0] == "submit")
    assert run.metrics.summary()["staleness_observed_max"] <= 2


def test_engine_that_never_gets_the_version_ends_the_run_under_its_name():
    store = ListStore()
    go(make_run(steps=2, checkpoints=store))
    run = make_run(start=store.states[0], answer_timeout_s=0.02, poll_wait_s=0.005)
    assert failure(run) == f"{NAMES[0]}: waited 0.02 s for policy version 2 there"


def test_run_resumed_at_its_end_trains_nothing_and_writes_no_second_checkpoint():
    store, second = ListStore(), ListStore()
    go(make_run(steps=3, checkpoints=store))
    run = go(resumed(store.states[-1], steps=3, checkpoints=second))
    assert run.learner.steps == 0 and second.whole == []
    assert run.metrics.summary()["steps"] == 3


def test_time_limit_counts_the_seconds_before():
    clock = FakeClock()

    async def ten_seconds(step: int) -> None:
        await asyncio.sleep(0)
        clock.now += 10

    options = {"clock": clock, "learner": {"during": ten_seconds}}
    store = ListStore()
    go(make_run(steps=2, checkpoints=store, **options))
    clock.now += 1000  # between the processes
    run = go(resumed(store.states[-1], steps=50, max_seconds=35, **options))
    assert run.learner.steps == 2
    assert run.metrics.summary()["seconds"] == 40
    assert run.metrics.summary()["seconds_to_first_step"] == 10


def test_guard_goes_on_where_it_was_and_keeps_the_bound_that_it_has_lowered():
    settings = GuardSettings(max_kl=1.0, patience_steps=2, max_reward_drop=None)
    sick = {"offpolicy/kl_behavior": 5.0}
    store = ListStore()
    options = {"guard": settings, "bound": 4, "learner": {"report": lambda step: sick}}
    run = go(make_run(steps=5, checkpoints=store, **options))
    assert run.ledger.max_staleness == 2 and run.learner.rate == 1.0
    state = store.states[-1]
    assert state.max_staleness == 2

    guard = CollapseGuard(settings)
    guard.restore(state.guard)
    assert guard.observe(sick).action.name == "LOWER_RATE", "the sixth sick step of three times two"

    run = resumed(state, steps=6, **options)
    go(run)
    assert run.ledger.max_staleness == 2
    assert go(resumed(state, steps=6, **{**options, "bound": 1})).ledger.max_staleness == 1


def test_state_of_the_guard_is_strict_json_before_any_reward():
    guard = CollapseGuard(GuardSettings())
    text = json.dumps(guard.state(), allow_nan=False)
    other = CollapseGuard(GuardSettings())
    other.restore(json.loads(text))
    assert other.state() == guard.state()
    with pytest.raises(ValueError, match="another form"):
        other.restore({"level": 1})


def test_counts_of_the_ledger_come_back_without_groups():
    state = LedgerState(
        next_group_id=9, groups=(), consumed=3, retired=1, dropped={DropReason.STALE: 2}
    )
    values = json.loads(json.dumps(ledger_counts(state)))
    restored = RunState(groups=values).ledger_state()
    for name in ("next_group_id", "groups", "consumed", "retired", "dropped"):
        assert getattr(restored, name) == getattr(state, name)


@pytest.mark.parametrize(
    "values", [{"step": -1}, {"step": 1.5}, {"policy_version": "3"}, {"stepp": 3}]
)
def test_state_of_another_form_is_refused(values):
    with pytest.raises(ValueError, match=r"of another form|must be an int"):
        RunState.from_json(values)
    with pytest.raises(ValueError, match="another form"):
        RunState(groups={"consumed": 1}).ledger_state()
