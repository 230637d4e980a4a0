"""Fakes of what surrounds the code under test; each refuses what the real part would refuse.

They wait for events, never for time, and write what happened into lists that tests compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from skyrl_async.types import (
    Assignment,
    DroppedGroup,
    EvaluationResult,
    RolloutReport,
    SampledBatch,
    StepResult,
    Task,
    TrajectoryGroup,
)
from tests.records import make_trajectory, make_turn

Event = tuple[Any, ...]


class FakeClock:
    """Seconds that only go on when told."""

    def __init__(self, now: float = 50.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ListSink:
    """Keeps the metrics of every step; refuses what a file could not hold."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, step, *, metrics, histograms) -> None:
        json.dumps(metrics, allow_nan=False)
        assert metrics["step"] == step
        self.lines.append({**metrics, **histograms})

    def close(self) -> None:
        pass


def two_member_group(assignment: Assignment, version: int) -> TrajectoryGroup:
    """Return a finished group of ``assignment``: two tokens each, rewards 0 and 1."""
    return TrajectoryGroup(
        group_id=assignment.group_id,
        task_id=assignment.task.task_id,
        trajectories=tuple(
            make_trajectory(make_turn([1, 2], [3, 4], version=version), reward=reward)
            for reward in (0.0, 1.0)
        ),
    )


Finish = Callable[[Assignment, int], TrajectoryGroup | DroppedGroup | None]


class FakeRolloutWorker:
    """Reports at most one group per poll, as ``finish`` makes it; None leaves it in flight.

    Args:
        name: in the events.
        events: shared list; gets ``("submit", name, group_id)``, ``("report", name, group_id)``,
            ``("live", name, version)`` and ``("evaluate", name, version)``.
        finish: makes the group, given the version that the engine has.
        polls_before_live: empty reports of the old version after a publish.
        evaluate: called with the tasks, returns the mean reward.
    """

    def __init__(
        self,
        name: str,
        events: list[Event],
        *,
        finish: Finish = two_member_group,
        polls_before_live: int = 0,
        evaluate: Callable[[int], Awaitable[float]] | None = None,
    ) -> None:
        self.name = name
        self.version = 0
        self.polling = False
        self.in_flight: dict[int, Assignment] = {}
        self.most_in_flight = 0
        self.on_submit: Callable[[], Awaitable[None]] | None = None
        self.on_poll: Callable[[], Awaitable[None]] | None = None
        self._events = events
        self._finish = finish
        self._polls_before_live = polls_before_live
        self._evaluate = evaluate
        self._published: list[tuple[int, int]] = []  # (polls to wait, version)
        self._seen: set[int] = set()
        self._news = asyncio.Event()

    def publish(self, version: int) -> None:
        """Make a version available; the newest wins."""
        assert version > self.version
        self._published = [(self._polls_before_live, version)]
        self._news.set()

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        assert assignments, "nothing to play"
        for assignment in assignments:
            assert assignment.group_id not in self._seen, "a group is played once"
            self._seen.add(assignment.group_id)
            self.in_flight[assignment.group_id] = assignment
            self._events.append(("submit", self.name, assignment.group_id))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self._news.set()
        if self.on_submit is not None:
            await self.on_submit()

    async def poll(self, *, wait_s: float) -> RolloutReport:
        assert not self.polling and wait_s > 0
        self.polling = True
        try:
            if self.on_poll is not None:
                await self.on_poll()
            report = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while report is None:
                        self._news.clear()
                        await asyncio.sleep(0)
                        if (report := self._next_report()) is None:
                            await self._news.wait()
            return report or self._report()
        finally:
            self.polling = False

    async def evaluate(self, tasks: Sequence[Task]) -> EvaluationResult:
        assert tasks and all(isinstance(task, Task) for task in tasks)
        assert self._evaluate is not None, "no evaluation was expected"
        version = self.version
        self._events.append(("evaluate", self.name, version))
        reward = await self._evaluate(version)
        return EvaluationResult(
            policy_version=version, mean_reward=reward, num_tasks=len(tasks), num_failures=0
        )

    def _next_report(self) -> RolloutReport | None:
        if self._published:
            polls, version = self._published.pop()
            if polls:
                self._published = [(polls - 1, version)]
                return self._report()
            self.version = version
            self._events.append(("live", self.name, version))
            return self._report()
        for group_id, assignment in self.in_flight.items():
            group = self._finish(assignment, self.version)
            if group is not None:
                assert group.group_id == group_id
                del self.in_flight[group_id]
                self._events.append(("report", self.name, group_id))
                return self._report(group)
        return None

    def _report(self, *groups: TrajectoryGroup | DroppedGroup) -> RolloutReport:
        tokens = sum(group.num_generated_tokens for group in groups)
        return RolloutReport(
            engine_version=self.version, groups=groups, counts={"generated_tokens": tokens}
        )


class FakeLearner:
    """Checks every batch against the bound and publishes to the workers without waiting for them.

    Args:
        workers: get every version that a step makes.
        events: shared list; gets ``("step", version)`` and ``("trained", version)``.
        groups_per_step: size of each batch.
        max_staleness: of the tokens that a batch may train.
        skip: number of a step, from 1, to whether its gradient is not finite.
        during: called in each step with its number, before it ends.
        report: number of a step, from 1, to further metrics of it.
    """

    def __init__(
        self,
        workers: Sequence[FakeRolloutWorker],
        events: list[Event],
        *,
        groups_per_step: int,
        max_staleness: int,
        skip: Callable[[int], bool] = lambda step: False,
        during: Callable[[int], Awaitable[None]] | None = None,
        report: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        self.version = 0
        self.steps = 0
        self.rate = 1.0
        self._remembered: int | None = None
        self._report = report
        self.stepping = False
        self._workers = workers
        self._events = events
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._skip = skip
        self._during = during
        self._trained: set[int] = set()

    async def step(self, batch: SampledBatch) -> StepResult:
        assert not self.stepping, "one step at a time"
        self.stepping = True
        try:
            counts = self._check(batch)
            self.steps += 1
            self._events.append(("step", self.version))
            await (asyncio.sleep(0) if self._during is None else self._during(self.steps))
        finally:
            self.stepping = False
        metrics = {"optimizer_steps": 2.0 * self.steps, **self._report(self.steps)}
        if self._skip(self.steps):
            return StepResult(
                policy_version=self.version, skipped=True, metrics=metrics, staleness_counts={}
            )
        self.version += 1
        for worker in self._workers:
            worker.publish(self.version)
        self._events.append(("trained", self.version))
        return StepResult(
            policy_version=self.version, skipped=False, metrics=metrics, staleness_counts=counts
        )

    async def remember(self) -> None:
        assert not self.stepping
        self._remembered = self.version
        self._events.append(("remembered", self.version))

    async def roll_back(self) -> int:
        assert not self.stepping and self._remembered is not None
        self.version += 1
        for worker in self._workers:
            worker.publish(self.version)
        self._events.append(("rolled back", self._remembered, self.version))
        return self.version

    async def scale_rate(self, factor: float) -> None:
        assert 0 < factor < 1
        self.rate *= factor

    def _check(self, batch: SampledBatch) -> Counter[int]:
        assert batch.train_version == self.version
        assert len(batch.groups) == self._groups_per_step
        cut_off = max(0, self.version - self._max_staleness)
        counts: Counter[int] = Counter()
        for sampled in batch.groups:
            assert sampled.min_trainable_version >= cut_off, "a bound may only be tightened"
            assert sampled.group.group_id not in self._trained, "a group is trained once"
            self._trained.add(sampled.group.group_id)
            for trajectory in sampled.group.trajectories:
                versions = trajectory.policy_versions[trajectory.sampled].tolist()
                counts.update(self.version - v for v in versions if v >= cut_off)
        assert counts and min(counts) >= 0, "tokens cannot be newer than the step that trains them"
        return counts
