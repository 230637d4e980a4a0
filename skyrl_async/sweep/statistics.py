"""Rewards of a sweep by method and lag: means over seeds, intervals, collapses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import variance
from typing import Any

from skyrl_async.sweep.rows import Row

CONFIDENCE = 0.95
COLLAPSE = 0.5
"""A run collapsed if its reward ended below this share of the best that it had."""
_WINDOW = 10
"""Steps over which the best reward of a run is averaged, so that it is not the luckiest batch."""
_MIN_BEST = 0.05
"""A run that never had more reward cannot lose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over independent runs, with Student's two-sided confidence interval.

    Attributes:
        mean: of the values.
        low: lower end; the mean with a single value.
        high: upper end; the mean with a single value.
        count: values.
    """

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Return ``mean ± t · s / sqrt(n)``, with ``t`` of ``n - 1`` degrees of freedom.

    Raises:
        ValueError: without values.
        ImportError: without SciPy, which ``pip install 'skyrl_async[lab]'`` brings.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean=mean, low=mean, high=mean, count=1)
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(variance(values) / count)
    return Interval(mean=mean, low=mean - half, high=mean + half, count=count)


def difference(
    values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the interval of ``mean(values) - mean(others)`` by Welch's unequal variances.

    Raises:
        ValueError: if one has fewer than two values.
        ImportError: without SciPy.
    """
    if min(len(values), len(others)) < 2:
        raise ValueError(
            f"a difference needs two values of each, got {len(values)} and {len(others)}"
        )
    from scipy.stats import t

    mean = math.fsum(values) / len(values) - math.fsum(others) / len(others)
    count = min(len(values), len(others))
    shares = [variance(group) / len(group) for group in (values, others)]
    if not sum(shares):
        return Interval(mean=mean, low=mean, high=mean, count=count)
    freedom = sum(shares) ** 2 / (
        shares[0] ** 2 / (len(values) - 1) + shares[1] ** 2 / (len(others) - 1)
    )
    half = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(sum(shares))
    return Interval(mean=mean, low=mean - half, high=mean + half, count=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All seeds of one method at one lag.

    Attributes:
        method: name.
        lag: in versions.
        steps: of each run.
        reward: of the last policies, greedily on held-out tasks.
        reward_final: of the episodes of the last tenth of the steps.
        ess_fraction: mean over the steps after warm-up, then over seeds; None if not measured.
        kl_behavior: the same, in nats per token.
        collapsed: runs that lost their reward again; see :func:`has_collapsed`.
        failed: runs that did not finish; they are in none of the means.
        seconds: of training, on the machine that ran it.
    """

    method: str
    lag: int
    steps: int
    reward: Interval
    reward_final: Interval
    ess_fraction: Interval | None
    kl_behavior: Interval | None
    collapsed: int
    failed: int
    seconds: Interval


def summarize(rows: Iterable[Row], *, method: str = "method", lag: str = "lag") -> list[Summary]:
    """Return one summary for each method, lag and number of steps, ordered by these.

    Args:
        rows: of a sweep.
        method: axis of the methods.
        lag: axis of the lags.
    """
    cells: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        key = (str(row.cell[method]), int(row.cell[lag]), int(row.config["run"]["steps"]))
        cells.setdefault(key, []).append(row)
    return [_summary(key, group) for key, group in sorted(cells.items()) if _any_finished(group)]


def _any_finished(rows: Iterable[Row]) -> bool:
    """Return whether a row has a reward."""
    return any(row.status == "finished" and row.reward is not None for row in rows)


def _summary(key: tuple[str, int, int], rows: Sequence[Row]) -> Summary:
    done = [row for row in rows if row.status == "finished" and row.reward is not None]
    method, lag, steps = key
    return Summary(
        method=method,
        lag=lag,
        steps=steps,
        reward=interval([float(row.reward or 0.0) for row in done]),
        reward_final=interval([float(row.reward_final or 0.0) for row in done]),
        ess_fraction=_of_series(done, "offpolicy/ess_fraction", lag),
        kl_behavior=_of_series(done, "offpolicy/kl_behavior", lag),
        collapsed=sum(has_collapsed(row) for row in done),
        failed=sum(row.status == "failed" for row in rows),
        seconds=interval([float(row.seconds or 0.0) for row in done]),
    )


def _of_series(rows: Sequence[Row], name: str, lag: int) -> Interval | None:
    """Return a metric's mean over the steps that had the lag, with its interval over the seeds."""
    means = []
    for row in rows:
        values = [v for v in row.series.get(name, ())[lag:] if v is not None]
        if values:
            means.append(math.fsum(values) / len(values))
    return interval(means) if means else None


def smoothed(values: Sequence[float | None], *, window: int = _WINDOW) -> list[float]:
    """Return the means of the last ``window`` values at every step; missing ones are left out."""
    out: list[float] = []
    kept: list[float] = []
    for value in values:
        if value is not None:
            kept.append(value)
        last = kept[-window:]
        out.append(math.fsum(last) / len(last) if last else 0.0)
    return out


def has_collapsed(row: Row) -> bool:
    """Return whether a run ended below half of the best reward that it had.

    Both are means over ten steps of the sampled episodes: the end is the last such mean.
    """
    means = smoothed(row.series.get("reward/mean", ()))[_WINDOW - 1 :]
    return bool(means) and max(means) >= _MIN_BEST and means[-1] < COLLAPSE * max(means)


def as_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return method, lag, seed and reward of every run, as values of JSON."""
    return [
        {
            **row.cell,
            "steps": row.config["run"]["steps"],
            "reward": row.reward,
            "reward_final": row.reward_final,
            "collapsed": has_collapsed(row),
            "status": row.status,
            "seconds": row.seconds,
        }
        for row in rows
    ]
