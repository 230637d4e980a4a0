"""Counts what a simulated run does."""

from __future__ import annotations

from collections import Counter

import numpy as np

from skyrl_async.coordination.staleness import StalenessCost
from skyrl_async.plan.scenario import Forecast
from skyrl_async.simulate.virtual_engine import EngineTotals
from skyrl_async.types import SampledBatch


class Tally:
    """Counts steps, tokens and seconds, and makes a forecast of them.

    Args:
        max_staleness: ``K``.

    Attributes:
        dropped: groups that left the buffer untrained.
    """

    def __init__(self, *, max_staleness: int) -> None:
        self.dropped = 0
        self._max_staleness = max_staleness
        self._staleness: Counter[int] = Counter()
        self._steps = self._groups = self._trajectories = 0
        self._trained_tokens = 0.0
        self._learner_s = 0.0
        self._generated = 0.0
        self._engine_idle_s = 0.0

    def step(self, batch: SampledBatch, *, busy_s: float, tokens_per_entry: float) -> None:
        """Count a learner step.

        Args:
            batch: that it trained.
            busy_s: seconds that it took.
            tokens_per_entry: tokens that one entry of the batch's arrays stands for.

        Raises:
            RuntimeError: if a token is beyond the bound.
        """
        self._steps += 1
        self._learner_s += busy_s
        self._groups += len(batch.groups)
        for sampled in batch.groups:
            for trajectory in sampled.trajectories:
                versions = trajectory.policy_versions[1:]
                kept = versions[versions >= sampled.min_trainable_version]
                if not len(kept):
                    continue
                self._trajectories += 1
                self._trained_tokens += len(kept) * tokens_per_entry
                if kept[0] == kept[-1]:
                    self._staleness[batch.train_version - int(kept[0])] += len(kept)
                    continue
                ages, counts = np.unique(batch.train_version - kept, return_counts=True)
                self._staleness.update(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
        if max(self._staleness, default=0) > self._max_staleness:
            raise RuntimeError(
                f"a token of staleness {max(self._staleness)} was trained, the bound is "
                f"{self._max_staleness}"
            )

    def engine(self, totals: EngineTotals) -> None:
        """Count what an engine did."""
        self._generated += totals.generated_tokens
        self._engine_idle_s += totals.idle_s

    def forecast(self, *, seconds: float, num_engines: int, cost: StalenessCost) -> Forecast:
        """Return the rates over so many seconds."""
        entries = self._staleness.total() or 1
        costs = cost.metrics()
        return Forecast(
            seconds=seconds,
            steps_per_s=self._steps / seconds,
            tokens_per_s=self._generated / seconds,
            trained_tokens_per_s=self._trained_tokens / seconds,
            trajectories_per_s=self._trajectories / seconds,
            learner_idle_fraction=max(0.0, 1 - self._learner_s / seconds),
            engine_idle_fraction=min(1.0, self._engine_idle_s / (num_engines * seconds)),
            staleness_mean=sum(age * n for age, n in self._staleness.items()) / entries,
            staleness_max=max(self._staleness, default=0),
            staleness_fractions={a: n / entries for a, n in sorted(self._staleness.items())},
            dropped_fraction=self.dropped / max(1, self.dropped + self._groups),
            masked_fraction=costs.get("masked_fraction", 0.0),
            lost_generation_fraction=costs.get("lost_generation_fraction", 0.0),
            lost_over_kept_length=costs.get("lost_over_kept_length"),
        )
