"""Runs of the coordinator with workers that say what happened and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.checkpointing import CheckpointStore
from skyrl_async.coordination.coordinator import (
    Coordinator,
    CoordinatorSettings,
    WorkerFailed,
)
from skyrl_async.coordination.filters import FilterSettings
from skyrl_async.coordination.guard import CollapseGuard, GuardSettings
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.run_state import RunState
from skyrl_async.coordination.staleness import RuleName, StalenessRule
from skyrl_async.environments.tasks import TaskSource, heldout_tasks
from skyrl_async.metrics.recorder import Recorder
from skyrl_async.metrics.trace import NULL_TRACER, Tracing
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import Assignment, DroppedGroup, DropReason
from tests.fakes import Event, FakeLearner, FakeRolloutWorker, ListSink

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
    rule: RuleName = "mask",
    steps: int = 3,
    workers: Sequence[dict[str, Any]] = ({}, {}),
    learner: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    guard: GuardSettings | None = None,
    filters: FilterSettings | None = None,
    checkpoints: CheckpointStore | None = None,
    start: RunState | None = None,
    tracer: Tracing = NULL_TRACER,
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
    staleness = StalenessRule(name=rule, max_staleness=bound, groups_per_step=BATCH)
    ledger = GroupLedger(
        rule=staleness,
        admission=Admission(
            groups_per_step=BATCH,
            max_staleness=bound,
            largest_group_bytes=LARGEST_GROUP_BYTES,
            capacity_bytes=100 * LARGEST_GROUP_BYTES,
            live_version=start.policy_version if start else 0,
        ),
        buffer=ReplayBuffer(
            groups_per_step=BATCH,
            rule=staleness,
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
        tracer=tracer,
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
