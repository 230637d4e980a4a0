"""The state that the console shows, without how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

_TRENDS = (
    "reward/mean",
    "eval/reward_mean",
    "policy/entropy",
    "staleness/mean",
    "offpolicy/ess_fraction",
    "offpolicy/clip_fraction",
    "throughput/generated_tokens_per_s",
    "throughput/trajectories_per_s",
    "buffer/groups",
)


class Trend:
    """The whole history of one number in at most ``2 * capacity`` means of equally many values."""

    __slots__ = ("_capacity", "_pending", "_stride", "means")

    def __init__(self, *, capacity: int = 128) -> None:
        self.means: list[float] = []
        self._capacity = capacity
        self._pending: list[float] = []
        self._stride = 1

    def copy(self) -> Trend:
        """Return a history that does not change with this one."""
        other = Trend(capacity=self._capacity)
        other.means, other._pending = list(self.means), list(self._pending)
        other._stride = self._stride
        return other

    def add(self, value: float) -> None:
        """Append ``value``."""
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        self.means.append(sum(self._pending) / self._stride)
        self._pending.clear()
        if len(self.means) == 2 * self._capacity:
            self.means = _pairwise_means(self.means)
            self._stride *= 2


@dataclass(slots=True)
class RunView:
    """Everything that is shown.

    Attributes:
        run_name: of the run.
        steps: learner steps to train, None if open.
        staleness_max: the configured bound, None if unknown.
        footer: last line of the live table.
        step: last finished step.
        elapsed_s: since the console was made.
        seconds_left: estimate, None if unknown.
        metrics: newest value of every metric seen so far.
        trends: history of the metrics that have a line in the table.
        lag_counts: trained tokens by staleness in the newest step.
        dropped: total by reason.
        eval_step: step of the newest evaluation.
        phases: finished start-up phases with their seconds.
        activity: what goes on besides training, with its seconds; None for nothing.
    """

    run_name: str
    steps: int | None = None
    staleness_max: int | None = None
    footer: str = ""
    step: int = 0
    elapsed_s: float = 0.0
    seconds_left: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trends: dict[str, Trend] = field(default_factory=dict)
    lag_counts: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    eval_step: int | None = None
    phases: list[tuple[str, float]] = field(default_factory=list)
    activity: tuple[str, float] | None = None

    def copy(self) -> RunView:
        """Return a view that does not change with this one."""
        trends = {name: trend.copy() for name, trend in self.trends.items()}
        return replace(
            self,
            metrics=dict(self.metrics),
            trends=trends,
            lag_counts=dict(self.lag_counts),
            dropped=dict(self.dropped),
            phases=list(self.phases),
        )

    def show(self, metrics: Mapping[str, float | None]) -> None:
        """Take ``metrics`` as the newest values; those that are None or not finite keep the old."""
        for name, value in metrics.items():
            if value is not None and math.isfinite(value):
                self.metrics[name] = value

    def append(
        self,
        step: int,
        *,
        metrics: Mapping[str, float | None],
        histograms: Mapping[str, Mapping[int, int]],
    ) -> None:
        """Take in the metrics of a finished step."""
        self.step = step
        self.show(metrics)
        for name, value in metrics.items():
            if value is None or not math.isfinite(value):
                continue
            if name in _TRENDS:
                self.trends.setdefault(name, Trend()).add(value)
            # Beside the reasons there is the number of tokens that were lost with the groups.
            if name.startswith("dropped/") and name != "dropped/generated_tokens":
                reason = name.removeprefix("dropped/")
                self.dropped[reason] = self.dropped.get(reason, 0) + int(value)
        if metrics.get("eval/reward_mean") is not None:
            self.eval_step = step
        if "staleness/histogram" in histograms:
            self.lag_counts = dict(histograms["staleness/histogram"])


def _pairwise_means(values: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
