"""Run metrics on a clock that stands still, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping

from skyrl_async.coordination.run_metrics import Progress, RunMetrics
from skyrl_async.coordination.staleness import StalenessCost
from skyrl_async.metrics.recorder import Recorder
from skyrl_async.types import (
    DroppedGroup,
    RolloutReport,
    SampledBatch,
    SampledGroup,
    StepResult,
    TrajectoryGroup,
)
from tests.fakes import FakeClock, ListSink
from tests.records import make_trajectory, make_turn


class World:
    """A recorder on a clock that stands still, and the metrics under test."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.sink = ListSink()
        self.metrics = RunMetrics(Recorder([self.sink], clock=self.clock), clock=self.clock)
        self.steps = 0

    def step(
        self,
        *groups: TrajectoryGroup,
        staleness: Mapping[int, int] | None = None,
        skipped: bool = False,
        cost: StalenessCost | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> dict[str, float | None]:
        """Finish a step on ``groups``, 10 seconds after the one before."""
        self.clock.now += 10
        self.steps += 1
        version = self.steps - skipped
        return self.metrics.learner_step(
            SampledBatch(
                lease_id=self.steps,
                train_version=self.steps - 1,
                groups=tuple(SampledGroup(group=g, min_trainable_version=0) for g in groups),
            ),
            StepResult(
                policy_version=version,
                skipped=skipped,
                metrics=metrics or {},
                staleness_counts=staleness or {},
            ),
            Progress(
                step=self.steps,
                policy_version=version,
                live_version=version - 1,
                buffered_groups=3,
                buffered_bytes=700,
            ),
            cost or StalenessCost(),
        )


def group(*rewards: float, group_id: int = 0, tokens: int = 2, turns: int = 1, failures=()):
    return TrajectoryGroup(
        group_id=group_id,
        task_id="t",
        trajectories=tuple(
            make_trajectory(*[make_turn([1], [2] * tokens)] * turns, reward=r) for r in rewards
        ),
        failures=failures,
    )


def report(*groups: TrajectoryGroup | DroppedGroup, **counts: float) -> RolloutReport:
    return RolloutReport(
        engine_version=1,
        groups=groups,
        seconds={"generate": 3.0, "environment": 1.0, "wait_group": 0.0},
        engine_seconds={"generate": 2.0, "swap": 1.0, "wait_episodes": 1.0, "idle": 0.0},
        counts=counts,
        maxima={"longest_gap_s": 0.5, "longest_gap_decode_steps": 3.0},
    )
