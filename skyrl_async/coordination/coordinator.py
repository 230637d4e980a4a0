"""The coordinator: three loops that hand records on, and wait for nothing that could not come.

==========  ==========================  ============================  ==============================
loop        takes                       waits for                     is woken by
==========  ==========================  ============================  ==============================
collect     reports of one actor        a finished group or a swap    the actor, or ``poll_wait_s``
admit       slots, tasks                (runs after every report)     released slots
train       full batches                a batch within the bound      every report and release
==========  ==========================  ============================  ==============================

State lives in the group ledger, which does not know the coordinator; generation never waits for
the train loop, and the train loop never waits for one particular group.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from skyrl_async.coordination.checkpointing import Checkpointing, CheckpointStore
from skyrl_async.coordination.coordinator_settings import CoordinatorSettings
from skyrl_async.coordination.deadlines import Deadline
from skyrl_async.coordination.engine_fleet import EngineFleet, EngineWorker, FleetSettings
from skyrl_async.coordination.errors import WorkerFailed, blaming
from skyrl_async.coordination.evaluation import Evaluations
from skyrl_async.coordination.filters import FilterSettings, GroupFilter
from skyrl_async.coordination.guard import CollapseGuard, GuardedTraining
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_metrics import Progress, RunMetrics
from skyrl_async.coordination.run_state import RunState, ledger_counts
from skyrl_async.coordination.workers import LearnerGroup, RolloutWorker, Tasks
from skyrl_async.metrics.drawing import drawn
from skyrl_async.metrics.trace import NULL_TRACER, Args, Tracing
from skyrl_async.types import (
    AnyGroup,
    Assignment,
    DroppedGroup,
    DropReason,
    RolloutReport,
    SampledBatch,
    StepResult,
)

__all__ = ["MAX_SKIPPED_STEPS", "Coordinator", "CoordinatorSettings", "WorkerFailed"]

MAX_SKIPPED_STEPS = 10
"""Consecutive learner steps without a finite gradient after which the run gives up."""


class Coordinator:
    """Runs the loops until the run is over.

    ::

        coordinator = Coordinator(...)
        await coordinator.run()      # stop() ends it after the step, cancelling it at once

    Args:
        tasks: to play.
        groups: admission and replay buffer.
        rollouts: rollout actors by name.
        engines: workers beside engines, by name; without any, each rollout actor has an engine of
            its own name.
        learner: all ranks.
        metrics: told about everything.
        settings: limits.
        clock: seconds, monotonic.
        filters: groups that are not worth training; without them all are.
        guard: acts when training is about to collapse.
        checkpoints: writes them; without it there are none.
        tracer: makes the lanes on which it says what it waits for.
        start: where the run goes on; the other arguments must be there already.
    """

    def __init__(
        self,
        *,
        tasks: Tasks,
        groups: GroupLedger,
        rollouts: Mapping[str, RolloutWorker],
        learner: LearnerGroup,
        metrics: RunMetrics,
        settings: CoordinatorSettings,
        clock: Callable[[], float],
        engines: Mapping[str, EngineWorker] | None = None,
        filters: FilterSettings | None = None,
        guard: CollapseGuard | None = None,
        checkpoints: CheckpointStore | None = None,
        tracer: Tracing = NULL_TRACER,
        start: RunState | None = None,
    ) -> None:
        self._start = start or RunState()
        self._guarded, self._max_skipped_steps = None, MAX_SKIPPED_STEPS
        if guard is not None:
            # The guard has its turn before the run ends.
            self._max_skipped_steps += guard.steps_to_rollback
            self._guarded = GuardedTraining(
                guard, groups=groups, learner=learner, max_staleness=self._start.max_staleness
            )
        self._filter = GroupFilter(filters or FilterSettings())
        self._tasks = tasks
        self._groups = groups
        self._rollouts = dict(rollouts)
        self._learner = learner
        self._metrics = metrics
        self._settings = settings
        self._clock = clock
        self._lane = tracer.lane(role="coordinator", name="training")
        self._in_flight: Counter[str] = Counter()
        self._actor_of: dict[int, str] = {}
        self._policy_version = self._start.policy_version
        self._failed_in_a_row = 0
        self._news = asyncio.Event()
        self._stopping = False
        self._fleet = self._make_fleet(engines) if engines else None
        self._evaluations = Evaluations(
            rollouts=self._rollouts,
            fleet=self._fleet,
            metrics=metrics,
            settings=settings.evaluation,
            on_target=self._news.set,
            lane=tracer.lane(role="coordinator", name="evaluation"),
            clock=clock,
        )
        self._checkpoints = Checkpointing(
            checkpoints,
            every_steps=settings.checkpoint_every_steps,
            timeout_s=settings.checkpoint_timeout_s,
            last_step=self._start.step,
        )

    def _make_fleet(self, engines: Mapping[str, EngineWorker]) -> EngineFleet:
        share = len(self._rollouts) / len(engines)
        return EngineFleet(
            engines,
            ledger=self._groups,
            learner=self._learner,
            set_engines=self._set_engines,
            on_report=lambda _, report: self._metrics.engine_report(report, share=share),
            on_change=self._pool_changed,
            settings=FleetSettings(answer_timeout_s=self._settings.answer_timeout_s),
        )

    async def _set_engines(self, endpoints: Sequence[Any]) -> None:
        await asyncio.gather(*(w.set_engines(endpoints) for w in self._rollouts.values()))

    async def _pool_changed(self) -> None:
        await self._admit()
        self._news.set()

    @property
    def has_store(self) -> bool:
        """Whether checkpoints are written."""
        return self._checkpoints.enabled

    def stop(self) -> None:
        """End the run after the step that is under way, with a checkpoint and no evaluation."""
        self._stopping = True
        self._news.set()

    def state(self) -> RunState:
        """Return where the run is; between two learner steps only."""
        guarded = self._guarded
        return RunState(
            step=self._metrics.steps,
            policy_version=self._policy_version,
            tasks=self._tasks.state(),
            groups=ledger_counts(self._groups.state()),
            max_staleness=None if guarded is None else guarded.max_staleness,
            guard=None if guarded is None else guarded.state(),
            metrics=self._metrics.state(),
        )

    async def run(self) -> None:
        """Train until a limit is reached.

        Raises:
            WorkerFailed: if a worker, or a loop, ended with an error; named after it.
        """
        if self._fleet is None:
            await self._join_engines()
        named = {
            asyncio.create_task(self._collect(name, worker)): name
            for name, worker in self._rollouts.items()
        }
        if self._fleet is not None:
            named |= {asyncio.create_task(self._fleet.watch(n)): n for n in self._fleet.names}
        training = asyncio.create_task(self._train())
        named[training] = "training"
        try:
            await self._admit()
            done, _ = await asyncio.wait(named, return_when=asyncio.FIRST_COMPLETED)
            # A dead worker also ends the training; its own name says more.
            for task in sorted(done, key=lambda t: t is training):
                with blaming(named[task]):
                    task.result()
        finally:
            for task in named:
                task.cancel()
            await asyncio.gather(*named, return_exceptions=True)
            await self._evaluations.cancel()
            await self._checkpoints.cancel()

    async def _join_engines(self) -> None:
        """Count in each actor's own engine, once it has the weights from which the run goes on."""
        version, settings = self._policy_version, self._settings
        for name, worker in self._rollouts.items():
            with blaming(name):
                async with Deadline(settings.answer_timeout_s, f"policy version {version} there"):
                    loaded = 0
                    while loaded < version:
                        loaded = (await worker.poll(wait_s=settings.poll_wait_s)).engine_version
            self._groups.engine_joined(name, version)

    async def _collect(self, name: str, worker: RolloutWorker) -> None:
        """Take reports of one actor, for ever."""
        settings = self._settings
        while True:
            async with Deadline(settings.answer_timeout_s + settings.poll_wait_s, "a report"):
                report = await worker.poll(wait_s=settings.poll_wait_s)
            self._take_report(name, report)
            await self._admit()
            self._news.set()

    def _take_report(self, name: str, report: RolloutReport) -> None:
        self._metrics.rollout_report(report)
        if self._fleet is None:
            self._groups.engine_loaded(name, report.engine_version)
        for group in report.groups:
            self._in_flight[self._actor_of.pop(group.group_id)] -= 1
            if isinstance(group, DroppedGroup):
                self._groups.drop(group)
                self._metrics.dropped([group])
                self._count_failure(group)
                continue
            self._failed_in_a_row = 0
            rejected = self._reject(group)
            if rejected is None:
                self._groups.insert(group)
            else:
                self._groups.drop(rejected)
                self._metrics.dropped([rejected])

    def _reject(self, group: AnyGroup) -> DroppedGroup | None:
        if self._groups.is_valid(group.group_id):
            return self._filter.check(group)
        return DroppedGroup(
            group_id=group.group_id,
            reason=DropReason.ROLLBACK,
            num_generated_tokens=group.num_generated_tokens,
        )

    def _count_failure(self, group: DroppedGroup) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._settings.max_failed_groups:
            raise RuntimeError(
                f"the last {self._failed_in_a_row} groups all failed, the newest with "
                f"{group.reason.value}: {group.detail}"
            )

    async def _admit(self) -> None:
        """Start as many groups as there are slots, each at the actor that plays fewest."""
        assignments: dict[str, list[Assignment]] = {}
        while True:
            name = min(self._rollouts, key=lambda n: self._in_flight[n])
            if self._in_flight[name] >= self._settings.max_groups_per_actor:
                break
            slot = self._groups.try_admit()
            if slot is None:
                break
            self._in_flight[name] += 1
            self._actor_of[slot.group_id] = name
            assignment = Assignment(group_id=slot.group_id, task=self._tasks.next())
            assignments.setdefault(name, []).append(assignment)
        for name, batch in assignments.items():
            with blaming(name):
                async with Deadline(self._settings.answer_timeout_s, "new tasks to be taken"):
                    await self._rollouts[name].submit(batch)
        if assignments:
            num_groups = sum(map(len, assignments.values()))
            self._lane.instant("admit", self._clock(), {"groups": num_groups})

    async def _train(self) -> None:
        """Take batches and train on them until a limit is reached, then evaluate once more."""
        settings = self._settings
        skipped = 0
        if self._guarded is not None:
            await self._guarded.start()
        for step in range(self._start.step + 1, settings.steps + 1):
            left_s = None
            if settings.max_seconds is not None:
                left_s = settings.max_seconds - self._metrics.seconds
                if left_s <= 0:
                    break
            with self._drawn("wait for a batch"):
                batch = await self._next_batch(left_s)
            if batch is None or self._is_over:
                break
            about = {"train_version": batch.train_version, "groups": len(batch.groups)}
            with blaming("learner"), self._drawn("learner step", about):
                async with Deadline(settings.step_timeout_s, "a step"):
                    result = await self._learner.step(batch)
            with self._drawn("finish the step"):
                await self._checkpoints.join()
                await self._finish_step(step, batch, result)
            skipped = skipped + 1 if result.skipped else 0
            if skipped >= self._max_skipped_steps:
                raise RuntimeError(
                    f"{skipped} learner steps in a row had a loss or gradient that was not finite; "
                    "lower optimizer.learning_rate (and critic.learning_rate, if there is a "
                    "critic) or look at the rewards"
                )
            with self._drawn("checkpoint and admit"):
                await self._checkpoints.after_step(step, self.state)
                await self._admit()
            self._evaluations.start_if_due(step)
        with self._drawn("end of the run"):
            await self._checkpoints.write(self._metrics.steps, self.state)
            if not self._stopping:
                await self._evaluate_at_the_end()
            await self._checkpoints.join()

    def _drawn(self, name: str, args: Args | None = None) -> AbstractContextManager[None]:
        return drawn(self._lane, name, clock=self._clock, args=args)

    @property
    def _is_over(self) -> bool:
        return self._stopping or self._evaluations.reached_target

    async def _next_batch(self, left_s: float | None) -> SampledBatch | None:
        """Wait for a batch; None when the time for training is over.

        Raises:
            TimeoutError: if none comes within ``stall_timeout_s``.
        """
        stall_s = self._settings.stall_timeout_s
        wait_s = stall_s if left_s is None else min(stall_s, left_s)
        end_s = self._clock() + wait_s
        while True:
            self._news.clear()
            outcome = self._groups.sample(self._policy_version)
            self._metrics.departed(outcome.departed)
            if outcome.released:
                await self._admit()
            if outcome.batch is not None or self._is_over:
                return outcome.batch
            try:
                async with asyncio.timeout(max(0.0, end_s - self._clock())):
                    await self._news.wait()
            except TimeoutError:
                if wait_s != stall_s:
                    return None
                raise TimeoutError(
                    f"no batch for {stall_s} s: {self._groups.counts()}, "
                    f"live version {self._groups.live_version} of {self._policy_version}"
                ) from None

    async def _finish_step(self, step: int, batch: SampledBatch, result: StepResult) -> None:
        if result.skipped:
            outcome = self._groups.skip(batch)
        else:
            self._policy_version = result.policy_version
            outcome = self._groups.commit(batch, result.policy_version)
        self._metrics.departed(outcome.departed)
        progress = Progress(
            step=step,
            policy_version=self._policy_version,
            live_version=self._groups.live_version,
            buffered_groups=self._groups.counts().buffered,
            buffered_bytes=self._groups.size_bytes,
        )
        row = self._metrics.learner_step(batch, result, progress, self._groups.take_cost())
        if self._guarded is not None:
            await self._guard_step(self._guarded, step, row)

    async def _guard_step(
        self, guarded: GuardedTraining, step: int, row: Mapping[str, float | None]
    ) -> None:
        async with Deadline(self._settings.step_timeout_s, "the collapse guard"):
            outcome = await guarded.after_step(step, row)
        if outcome.action is not None:
            self._metrics.guarded(outcome.action.name.lower())
        if outcome.ledger is not None:
            self._metrics.departed(outcome.ledger.departed)
        if outcome.policy_version is not None:
            self._policy_version = outcome.policy_version

    async def _evaluate_at_the_end(self) -> None:
        """Evaluate the last version, unless an evaluation already stopped the run."""
        if not await self._evaluations.wait():
            return
        async with Deadline(self._settings.answer_timeout_s, "the last weights to become live"):
            if self._settings.publishes_late:
                await self._learner.publish_newest()
            while self._groups.live_version < self._policy_version:
                self._news.clear()
                await self._news.wait()
        await self._evaluations.finish(self._policy_version)
