"""What the coordinator asks of task source, rollout actors and learner, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from skyrl_async.types import (
    Assignment,
    EvaluationResult,
    RolloutReport,
    SampledBatch,
    StepResult,
    Task,
)


class Tasks(Protocol):
    """An endless stream of training tasks."""

    def next(self) -> Task:
        """Return the next task."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps of the stream, as values of JSON."""
        ...


class RolloutWorker(Protocol):
    """One rollout actor, wherever it runs."""

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start to play."""
        ...

    async def poll(self, *, wait_s: float) -> RolloutReport:
        """Return what happened since the last report, at the latest after ``wait_s``."""
        ...

    async def evaluate(
        self, tasks: Sequence[Task], *, endpoint: Any | None = None
    ) -> EvaluationResult:
        """Play greedily with the weights that its engine, or the one at ``endpoint``, has now."""
        ...

    async def set_engines(self, endpoints: Sequence[Any]) -> None:
        """Play with these engines from now on; only where engines are workers of their own."""
        ...


class LearnerGroup(Protocol):
    """All learner ranks, as one."""

    async def step(self, batch: SampledBatch) -> StepResult:
        """Train on a batch, and start to publish what it made."""
        ...

    async def remember(self) -> None:
        """See :class:`skyrl_async.coordination.guard.RevertibleLearner`."""
        ...

    async def roll_back(self) -> int:
        """See :class:`skyrl_async.coordination.guard.RevertibleLearner`."""
        ...

    async def scale_rate(self, factor: float) -> None:
        """See :class:`skyrl_async.coordination.guard.RevertibleLearner`."""
        ...

    async def open_pair(self, engine_id: str) -> Any:
        """See :class:`skyrl_async.coordination.engine_fleet.Publishing`."""
        ...

    async def close_pair(self, engine_id: str) -> None:
        """See :class:`skyrl_async.coordination.engine_fleet.Publishing`."""
        ...

    async def publish_newest(self) -> None:
        """See :class:`skyrl_async.coordination.engine_fleet.Publishing`."""
        ...
