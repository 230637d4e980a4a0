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
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_async.coordination.deadlines import Deadline
from skyrl_async.coordination.engine_fleet import EngineFleet, EngineWorker, FleetSettings
from skyrl_async.coordination.filters import FilterSettings, GroupFilter
from skyrl_async.coordination.guard import CollapseGuard, GuardedTraining
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_metrics import Progress, RunMetrics
from skyrl_async.coordination.workers import LearnerGroup, RolloutWorker, Tasks
from skyrl_async.types import (
    Assignment,
    DroppedGroup,
    DropReason,
    RolloutReport,
    SampledBatch,
    StepResult,
    Task,
    TrajectoryGroup,
)

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Consecutive learner steps without a finite gradient after which the run gives up."""


class WorkerFailed(Exception):
    """A worker or a loop of the run ended with an error; the message begins with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """When to stop, and how long to wait.

    Attributes:
        steps: learner steps.
        max_seconds: of training; None for no limit.
        stop_at_eval_reward: an evaluation that reaches it ends the run; None for never.
        evaluation_every_steps: learner steps between evaluations; 0 evaluates only at the end.
        evaluation_tasks: held-out tasks; none never evaluates.
        max_groups_per_actor: in flight at one actor.
        poll_wait_s: an actor reports at least this often.
        answer_timeout_s: an actor that does not answer a call for this long has failed.
        step_timeout_s: a learner step that takes longer has failed.
        stall_timeout_s: without a batch for this long, the run has failed.
        evaluation_timeout_s: an evaluation that takes longer has failed.
        max_failed_groups: consecutive groups without one that succeeds, after which the run fails.
    """

    steps: int
    max_seconds: float | None = None
    stop_at_eval_reward: float | None = None
    evaluation_every_steps: int = 0
    evaluation_tasks: tuple[Task, ...] = ()
    max_groups_per_actor: int = 1024
    poll_wait_s: float = 1.0
    answer_timeout_s: float = 60.0
    step_timeout_s: float = 600.0
    stall_timeout_s: float = 700.0
    evaluation_timeout_s: float = 300.0
    max_failed_groups: int = 200


class Coordinator:
    """Runs the loops until the run is over.

    ::

        coordinator = Coordinator(...)
        await coordinator.run()      # cancel it to interrupt the run

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
    ) -> None:
        self._guarded = None
        if guard is not None:
            self._guarded = GuardedTraining(guard, groups=groups, learner=learner)
        self._filter = GroupFilter(filters or FilterSettings())
        self._tasks = tasks
        self._groups = groups
        self._rollouts = dict(rollouts)
        self._learner = learner
        self._metrics = metrics
        self._settings = settings
        self._clock = clock
        self._in_flight: Counter[str] = Counter()
        self._actor_of: dict[int, str] = {}
        self._policy_version = 0
        self._failed_in_a_row = 0
        self._news = asyncio.Event()
        self._evaluation: asyncio.Task[None] | None = None
        self._reached_eval_reward = False
        self._fleet = self._make_fleet(engines) if engines else None

    def _make_fleet(self, engines: Mapping[str, EngineWorker]) -> EngineFleet:
        return EngineFleet(
            engines,
            ledger=self._groups,
            learner=self._learner,
            set_engines=self._set_engines,
            on_report=lambda _, report: self._metrics.engine_report(report),
            on_change=self._pool_changed,
            settings=FleetSettings(answer_timeout_s=self._settings.answer_timeout_s),
        )

    async def _set_engines(self, endpoints: Sequence[Any]) -> None:
        await asyncio.gather(*(w.set_engines(endpoints) for w in self._rollouts.values()))

    async def _pool_changed(self) -> None:
        await self._admit()
        self._news.set()

    async def run(self) -> None:
        """Train until a limit is reached.

        Raises:
            WorkerFailed: if a worker, or a loop, ended with an error; named after it.
        """
        named = {
            asyncio.create_task(self._collect(name, worker)): name
            for name, worker in self._rollouts.items()
        }
        if self._fleet is None:
            for name in self._rollouts:
                self._groups.engine_joined(name, 0)
        else:
            named |= {asyncio.create_task(self._fleet.watch(n)): n for n in self._fleet.names}
        training = asyncio.create_task(self._train())
        named[training] = "training"
        try:
            await self._admit()
            done, _ = await asyncio.wait(named, return_when=asyncio.FIRST_COMPLETED)
            # A dead worker also ends the training; its own name says more.
            for task in sorted(done, key=lambda t: t is training):
                with _blaming(named[task]):
                    task.result()
        finally:
            others = [*named, *([self._evaluation] if self._evaluation else [])]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

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

    def _reject(self, group: TrajectoryGroup) -> DroppedGroup | None:
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
            with _blaming(name):
                async with Deadline(self._settings.answer_timeout_s, "new tasks to be taken"):
                    await self._rollouts[name].submit(batch)

    async def _train(self) -> None:
        """Take batches and train on them until a limit is reached, then evaluate once more."""
        settings = self._settings
        started_s = self._clock()
        skipped = 0
        if self._guarded is not None:
            await self._guarded.start()
        for step in range(1, settings.steps + 1):
            left_s = None
            if settings.max_seconds is not None:
                left_s = started_s + settings.max_seconds - self._clock()
                if left_s <= 0:
                    break
            batch = await self._next_batch(left_s)
            if batch is None or self._reached_eval_reward:
                break
            with _blaming("learner"):
                async with Deadline(settings.step_timeout_s, "a step"):
                    result = await self._learner.step(batch)
            await self._finish_step(step, batch, result)
            skipped = skipped + 1 if result.skipped else 0
            if skipped >= MAX_SKIPPED_STEPS:
                raise RuntimeError(
                    f"{skipped} learner steps in a row had a loss or gradient that was not finite; "
                    "lower optimizer.learning_rate or look at the rewards"
                )
            await self._admit()
            self._evaluate_if_due(step)
        await self._evaluate_at_the_end()

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
            if outcome.batch is not None or self._reached_eval_reward:
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
        if self._guarded is not None and not result.skipped:
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

    def _evaluate_if_due(self, step: int) -> None:
        if self._evaluation is not None and self._evaluation.done():
            self._evaluation.result()
            self._evaluation = None
        every = self._settings.evaluation_every_steps
        due = every and step % every == 0 and self._settings.evaluation_tasks
        if due and self._evaluation is None:
            self._evaluation = asyncio.create_task(self._evaluate())

    async def _evaluate(self) -> None:
        """Play the held-out tasks at the version that one engine has now."""
        name, worker = next(iter(self._rollouts.items()))
        tasks = self._settings.evaluation_tasks
        with _blaming(name):
            async with Deadline(self._settings.evaluation_timeout_s, "an evaluation"):
                if self._fleet is None:
                    result = await worker.evaluate(tasks)
                else:
                    result = await self._fleet.evaluate(
                        lambda endpoint: worker.evaluate(tasks, endpoint=endpoint)
                    )
        self._metrics.evaluated(result)
        logger.info(
            "evaluation at policy version %d: reward %.3f over %d tasks, %d failed",
            result.policy_version,
            result.mean_reward,
            result.num_tasks,
            result.num_failures,
        )
        target = self._settings.stop_at_eval_reward
        if target is not None and result.mean_reward >= target:
            self._reached_eval_reward = True
            self._news.set()

    async def _evaluate_at_the_end(self) -> None:
        """Evaluate the last version, unless an evaluation already stopped the run."""
        if self._evaluation is not None:
            await self._evaluation
        if not self._settings.evaluation_tasks or self._reached_eval_reward:
            return
        async with Deadline(self._settings.answer_timeout_s, "the last weights to become live"):
            while self._groups.live_version < self._policy_version:
                self._news.clear()
                await self._news.wait()
        last = self._metrics.last_evaluation
        if last is None or last.policy_version != self._policy_version:
            await self._evaluate()


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Put the name of a worker or loop before the text of an error that has none yet."""
    try:
        yield
    except WorkerFailed:
        raise
    except Exception as error:
        raise WorkerFailed(f"{name}: {error}" if str(error) else f"{name}: {error!r}") from error
