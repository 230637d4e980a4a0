"""What the coordinator saw, as metrics of each learner step and as the summary of the run."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from skyrl_async.coordination.engine_fleet import EngineReport
from skyrl_async.coordination.staleness import StalenessCost
from skyrl_async.metrics.ledger import PartTotals
from skyrl_async.metrics.recorder import Recorder
from skyrl_async.metrics.values import Histogram, Max, Mean, Std, Sum
from skyrl_async.types import (
    DepartedGroup,
    DroppedGroup,
    DropReason,
    EvaluationResult,
    GroupFate,
    RolloutReport,
    SampledBatch,
    StepResult,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run is at the end of a learner step.

    Attributes:
        step: learner steps done, skipped ones included.
        policy_version: of the learner.
        live_version: that every engine has loaded.
        buffered_groups: in the replay buffer.
        buffered_bytes: their size.
    """

    step: int
    policy_version: int
    live_version: int
    buffered_groups: int
    buffered_bytes: int


class RunMetrics:
    """Turns reports, drops and step results into recorded metrics, and keeps the run's totals.

    Args:
        recorder: writes one line per learner step.
        clock: seconds, monotonic; the run's time starts now.
        state: of :meth:`state`, to go on from there.

    Raises:
        ValueError: if the state is of another form.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        clock: Callable[[], float],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorder = recorder
        self._clock = clock
        self._started_s = clock()
        self._first_step_s: float | None = None
        self._reward_means: list[float] = []
        self._evaluations: list[EvaluationResult] = []
        self._dropped: Counter[str] = Counter()
        self._guard_actions: Counter[str] = Counter()
        self._failed_members: Counter[str] = Counter()
        self._generated = 0.0
        self._trajectories_trained = 0
        self._tokens_trained = 0
        self._cost = StalenessCost()
        self._staleness_max = 0
        self._steps = 0
        self._skipped_steps = 0
        self._has_warned = False
        self._parts = PartTotals()
        self._swap_owed_s = 0.0
        if state:
            self._restore(state)

    def rollout_report(self, report: RolloutReport) -> None:
        """Record what an actor reported."""
        r = self._recorder
        groups = [g for g in report.groups if not isinstance(g, DroppedGroup)]
        rewards = [t.reward for group in groups for t in group.trajectories]
        if rewards:
            r.record("reward/mean", Mean.of(rewards))
            r.record("reward/std", Std.of(rewards))
            r.count("throughput/trajectories", len(rewards))
            lengths = [t.num_generated_tokens for group in groups for t in group.trajectories]
            r.record("rollout/generated_tokens_mean", Mean.of(lengths))
            turns = [t.num_turns for group in groups for t in group.trajectories]
            r.record("rollout/turns_mean", Mean.of(turns))
        for group in report.groups:
            self._failed_members.update(reason.value for reason in group.failures)
        generated = report.counts.get("generated_tokens", 0.0)
        self._generated += generated
        r.count("throughput/generated_tokens", generated)
        r.record("sync/reprefilled_tokens", Sum(report.counts.get("reprefilled_tokens", 0.0)))
        r.record("sync/stall_s", Sum(report.counts.get("swap_stall_s", 0.0)))
        for name, value in report.maxima.items():
            r.record(f"engine/{name}", Max(value))
        self._count_parts("actor", report.seconds)
        self._count_parts("engine", self._with_swaps(report.engine_seconds))

    def _count_parts(self, role: str, seconds: Mapping[str, float]) -> None:
        if seconds:
            self._recorder.record_parts(role, seconds)
            self._parts.add(role, seconds)

    def _with_swaps(self, seconds: Mapping[str, float]) -> Mapping[str, float]:
        """Return the time of engines that clients saw busy, with the part that went into swaps."""
        swap_s = min(self._swap_owed_s, seconds.get("generate", 0.0))
        if swap_s <= 0:
            return seconds
        self._swap_owed_s -= swap_s
        return {
            **seconds,
            "generate": seconds["generate"] - swap_s,
            "swap": seconds.get("swap", 0.0) + swap_s,
        }

    def engine_report(self, report: EngineReport, *, share: float = 1.0) -> None:
        """Record what the worker beside an engine reported.

        Args:
            report: of it.
            share: rollout actors, each of which reports the time of all engines, over engines.
        """
        r = self._recorder
        stall_s = report.counts.get("stall_s", 0.0)
        self._swap_owed_s += stall_s * share
        r.record("sync/stall_s", Sum(stall_s))
        r.record("engine/restarts", Sum(report.counts.get("restarts", 0.0)))

    def dropped(self, groups: Iterable[DroppedGroup]) -> None:
        """Count groups that failed at their actor."""
        for group in groups:
            self._count_drop(group.reason, group.num_generated_tokens)

    def guarded(self, action: str) -> None:
        """Count an action of the collapse guard; it is written with the next step."""
        self._recorder.record(f"guard/{action}", Sum(1))
        self._guard_actions[action] += 1

    def evaluated(self, result: EvaluationResult) -> None:
        """Record an evaluation; it is written with the next step."""
        self._evaluations.append(result)
        self._recorder.record("eval/reward_mean", result.mean_reward)
        self._recorder.record("eval/policy_version", result.policy_version)
        self._recorder.record("eval/failures", result.num_failures)

    def departed(self, groups: Iterable[DepartedGroup]) -> None:
        """Count groups that left the replay buffer, and what the bound lost with them."""
        for departed in groups:
            if departed.reason is None:
                if departed.fate is GroupFate.RETIRED:
                    self._recorder.record("buffer/retired", Sum(1))
                continue
            group = departed.stored.group
            self._count_drop(departed.reason, group.num_generated_tokens)

    def _count_drop(self, reason: DropReason, num_tokens: int) -> None:
        self._dropped[reason.value] += 1
        self._recorder.record(f"dropped/{reason.value}", Sum(1))
        self._recorder.record("dropped/generated_tokens", Sum(num_tokens))

    def learner_step(
        self, batch: SampledBatch, result: StepResult, progress: Progress, cost: StalenessCost
    ) -> dict[str, float | None]:
        """Record a finished step and write all metrics since the step before."""
        if self._first_step_s is None:
            self._first_step_s = self.seconds
        r = self._recorder
        self._steps = progress.step
        self._cost += cost
        if result.skipped:
            self._skipped_steps += 1
        else:
            self._look_for_loss_tokens(progress.step, result)
            trained = sum(result.staleness_counts.values())
            self._trajectories_trained += sum(
                trajectory.max_policy_version >= sampled.min_trainable_version
                for sampled in batch.groups
                for trajectory in sampled.group.trajectories
            )
            self._tokens_trained += trained
            # Losses bias the whole run, so they are shown since its start.
            since_start = self._cost.metrics()
            since_start.update(masked_fraction=cost.metrics().get("masked_fraction", 0.0))
            r.add({f"staleness/{name}": value for name, value in since_start.items()})
            r.count("throughput/trained_tokens", trained)
            staleness = Histogram(dict(result.staleness_counts))
            r.record("staleness", staleness)
            self._staleness_max = max(self._staleness_max, staleness.max or 0)
            rewards = np.concatenate(
                [[t.reward for t in g.group.trajectories] for g in batch.groups]
            )
            r.record("reward/trained_mean", Mean.of(rewards))
        self._count_parts("learner", result.seconds)
        self._parts.end_step()
        r.record("learner/skipped_steps", Sum(float(result.skipped)))
        written = r.flush(
            progress.step,
            extra={
                "policy_version": progress.policy_version,
                "live_version": progress.live_version,
                "buffer/groups": progress.buffered_groups,
                "buffer/bytes": progress.buffered_bytes,
                **result.metrics,
            },
        )
        reward = written.get("reward/mean")
        if reward is not None:
            self._reward_means.append(reward)
        return written

    def _look_for_loss_tokens(self, step: int, result: StepResult) -> None:
        if result.metrics.get("learner/loss_tokens") != 0 or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "step %d trained on no token: masks reject all of them; widen the limits of "
            "correction.*, or see algorithm.mask_truncated (offpolicy/masked_fraction, each step)",
            step,
        )

    @property
    def steps(self) -> int:
        """Learner steps done, skipped ones included."""
        return self._steps

    @property
    def seconds(self) -> float:
        """Seconds of training, of all processes that the run had."""
        return self._clock() - self._started_s

    def checkpoint_written(self, save_s: float) -> None:
        """Record the seconds until a checkpoint was whole; written with the next step."""
        self._recorder.record("checkpoint/save_s", save_s)

    def state(self) -> dict[str, Any]:
        """Return the totals, to go on from; values of JSON."""
        last = self.last_evaluation
        return {
            "steps": self._steps,
            "skipped_steps": self._skipped_steps,
            "seconds": self.seconds,
            "seconds_to_first_step": self._first_step_s,
            "reward_means": list(self._reward_means),
            "last_evaluation": None if last is None else asdict(last),
            "dropped": dict(self._dropped),
            "guard_actions": dict(self._guard_actions),
            "failed_members": dict(self._failed_members),
            "tokens_generated": self._generated,
            "trajectories_trained": self._trajectories_trained,
            "tokens_trained": self._tokens_trained,
            "staleness_cost": asdict(self._cost),
            "staleness_max": self._staleness_max,
            "part_seconds": self._parts.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            last = state["last_evaluation"]
            self._evaluations = [] if last is None else [EvaluationResult(**last)]
            self._cost = StalenessCost(**state["staleness_cost"])
            self._started_s -= float(state["seconds"])
            self._first_step_s = state["seconds_to_first_step"]
            self._reward_means = [float(mean) for mean in state["reward_means"]]
            self._dropped.update(state["dropped"])
            self._guard_actions.update(state["guard_actions"])
            self._failed_members.update(state["failed_members"])
            self._generated = float(state["tokens_generated"])
            self._trajectories_trained = int(state["trajectories_trained"])
            self._tokens_trained = int(state["tokens_trained"])
            self._staleness_max = int(state["staleness_max"])
            self._steps = int(state["steps"])
            self._skipped_steps = int(state["skipped_steps"])
            self._parts.restore(state.get("part_seconds", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the saved totals are of another form ({error!r})") from None

    @property
    def last_evaluation(self) -> EvaluationResult | None:
        """The newest evaluation."""
        return self._evaluations[-1] if self._evaluations else None

    def summary(self) -> dict[str, Any]:
        """Return the run's totals under the names of ``summary.json``."""
        tail = self._reward_means[-max(1, math.ceil(len(self._reward_means) / 10)) :]
        last = self.last_evaluation
        return {
            "steps": self._steps,
            "skipped_steps": self._skipped_steps,
            "seconds": self.seconds,
            "seconds_to_first_step": self._first_step_s,
            "reward_final": sum(tail) / len(tail) if tail else None,
            "eval_reward_final": last.mean_reward if last else None,
            "eval_policy_version": last.policy_version if last else None,
            "trajectories_trained": self._trajectories_trained,
            "tokens_trained": self._tokens_trained,
            "tokens_generated": int(self._generated),
            "staleness_observed_max": self._staleness_max,
            "dropped": dict(self._dropped),
            "guard_actions": dict(self._guard_actions),
            "failed_members": dict(self._failed_members),
            "idle": self._parts.fractions(),
        }
