"""The metrics of a run in the text format that Prometheus scrapes.

Needs the library ``prometheus-client``, which the extra ``obs`` installs.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from skyrl_async.metrics.names import find
from skyrl_async.metrics.recorder import Histograms, Scalars

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the answer that carries an exposition."""

BUCKETS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""Upper bounds of every histogram, inclusive; one more bucket has no bound."""

_PREFIX = "skyrl_async_"
_LAST_STEP = "last_step_timestamp_seconds"


class PrometheusSink:
    """Keeps the last step's metrics, and the sum of all histograms, until somebody scrapes.

    Histograms only grow while the process lives, as Prometheus' ``rate`` and
    ``histogram_quantile`` expect. Use it from one thread.

    Args:
        unix_clock: seconds since 1970, taken when a step is written.
    """

    def __init__(self, *, unix_clock: Callable[[], float] = time.time) -> None:
        self._clock = unix_clock
        self._metrics: Scalars = {}
        self._histograms: dict[str, dict[int, int]] = {}
        self._last_step_unix_s: float | None = None

    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Take the metrics of one learner step."""
        self._metrics = {"step": step, **metrics}
        self._last_step_unix_s = self._clock()
        for name, counts in histograms.items():
            total = self._histograms.setdefault(name, {})
            for number, count in counts.items():
                total[number] = total.get(number, 0) + count

    def exposition(self) -> bytes:
        """Return what a scrape gets now; nothing but the end of the text before the first step."""
        return exposition(self._metrics, self._histograms, last_step_unix_s=self._last_step_unix_s)

    def close(self) -> None:
        """Do nothing: the last metrics stay readable."""


def exposition(
    metrics: Scalars, histograms: Histograms, *, last_step_unix_s: float | None = None
) -> bytes:
    """Return metrics as gauges and histograms, each with its meaning as ``HELP``.

    ``reward/mean`` becomes ``skyrl_async_reward_mean``. Values that were NaN or infinite are left
    out.

    Args:
        metrics: name -> value, as a sink gets them.
        histograms: name -> number -> how often; over the whole run, so that they only grow.
        last_step_unix_s: seconds since 1970 at the end of the last step, for
            ``skyrl_async_last_step_timestamp_seconds``.

    Raises:
        ValueError: if two names would be one name for Prometheus, or a count is negative.
        ImportError: without ``prometheus-client``.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Snapshot(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from families

    families = [*_gauges(metrics, last_step_unix_s), *_histogram_families(histograms)]
    _check_unique([family.name for family in families], [*metrics, *histograms])
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshot())
    return generate_latest(registry)


def _gauges(metrics: Scalars, last_step_unix_s: float | None) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, value in metrics.items():
        if value is not None:
            yield GaugeMetricFamily(_name(name), _help(name), value=value)
    if last_step_unix_s is not None:
        text = "end of the last learner step, in seconds since 1970"
        yield GaugeMetricFamily(_PREFIX + _LAST_STEP, text, value=last_step_unix_s)


def _histogram_families(histograms: Histograms) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    for name, counts in histograms.items():
        yield HistogramMetricFamily(
            _name(name),
            _help(name),
            buckets=_cumulative(name, counts),
            sum_value=sum(number * count for number, count in counts.items()),
        )


def _cumulative(name: str, counts: Mapping[int, int]) -> list[tuple[str, float]]:
    """Return for every bound how many numbers are at or below it."""
    inside = [0] * (len(BUCKETS) + 1)
    for number, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}: count {count} of {number} must be >= 0")
        inside[bisect_left(BUCKETS, number)] += count
    seen, out = 0, []
    for bound, count in zip((*BUCKETS, math.inf), inside, strict=True):
        seen += count
        out.append(("+Inf" if bound == math.inf else f"{bound}.0", float(seen)))
    return out


def _name(name: str) -> str:
    return _PREFIX + name.replace("/", "_")


def _help(name: str) -> str:
    metric = find(name)
    if metric is None:
        return name
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{name}: {metric.meaning}{unit}"


def _check_unique(families: list[str], names: list[str]) -> None:
    if len(set(families)) == len(families):
        return
    twice = {family for family in families if families.count(family) > 1}
    same = sorted(name for name in names if _name(name) in twice)
    raise ValueError(
        f"metrics {', '.join(same)} are one name for Prometheus, {', '.join(sorted(twice))}; "
        "rename one"
    )
