"""Greedy play of held-out tasks while training goes on, and once more at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skyrl_async.coordination.deadlines import Deadline
from skyrl_async.coordination.engine_fleet import EngineFleet
from skyrl_async.coordination.errors import blaming
from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.workers import RolloutWorker
from skyrl_async.metrics.drawing import drawn
from skyrl_async.metrics.trace import Lane
from skyrl_async.types import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """When to evaluate, and how long that may take.

    Attributes:
        tasks: held-out tasks; none never evaluates.
        every_steps: learner steps between evaluations; 0 evaluates only at the end.
        timeout_s: an evaluation that takes longer has failed.
        target: an evaluation that reaches this mean reward ends the run; None for never.
    """

    tasks: tuple[Task, ...] = ()
    every_steps: int = 0
    timeout_s: float = 300.0
    target: float | None = None


class Evaluations:
    """Runs at most one evaluation at a time, beside the training.

    ::

        evaluations.start_if_due(step)
        ...
        await evaluations.finish(policy_version)   # when all engines have that version

    Args:
        rollouts: rollout actors by name; the first one plays.
        fleet: engines that are workers of their own; one of them is withdrawn meanwhile.
        metrics: told the results.
        settings: when.
        on_target: called when a result reaches the target.
        lane: of the timeline.
        clock: ``time.monotonic``.
    """

    def __init__(
        self,
        *,
        rollouts: Mapping[str, RolloutWorker],
        fleet: EngineFleet | None,
        metrics: RunMetrics,
        settings: EvaluationSettings,
        on_target: Callable[[], None],
        lane: Lane,
        clock: Callable[[], float],
    ) -> None:
        self._rollouts = rollouts
        self._fleet = fleet
        self._metrics = metrics
        self._settings = settings
        self._on_target = on_target
        self._lane = lane
        self._clock = clock
        self._running: asyncio.Task[None] | None = None
        self.reached_target = False

    def start_if_due(self, step: int) -> None:
        """Evaluate in the background if it is time, and none is running.

        Raises:
            Exception: of the evaluation before.
        """
        if self._running is not None and self._running.done():
            self._running.result()
            self._running = None
        every = self._settings.every_steps
        due = every and step % every == 0 and self._settings.tasks
        if due and self._running is None:
            self._running = asyncio.create_task(self._evaluate())

    async def wait(self) -> bool:
        """Wait for the running evaluation; return whether another one is wanted at the end."""
        if self._running is not None:
            await self._running
        return bool(self._settings.tasks) and not self.reached_target

    async def finish(self, policy_version: int) -> None:
        """Evaluate the last version, unless that was done."""
        last = self._metrics.last_evaluation
        if last is None or last.policy_version != policy_version:
            await self._evaluate()

    async def cancel(self) -> None:
        """End the running evaluation."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _evaluate(self) -> None:
        """Play the held-out tasks at the version that one engine has now."""
        name, worker = next(iter(self._rollouts.items()))
        tasks = self._settings.tasks
        with blaming(name), drawn(self._lane, "evaluation", clock=self._clock):
            async with Deadline(self._settings.timeout_s, "an evaluation"):
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
        target = self._settings.target
        if target is not None and result.mean_reward >= target:
            self.reached_target = True
            self._on_target()
