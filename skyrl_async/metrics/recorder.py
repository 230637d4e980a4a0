"""Collects what the components report and writes it once per learner step."""

from __future__ import annotations

import math
import numbers
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsFloat

from skyrl_async.metrics.ledger import fractions
from skyrl_async.metrics.values import Accumulator, Histogram, Max, Mean, Std, Sum, ordered

_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")

Scalars = Mapping[str, float | None]
"""Metric name -> value; None stands for a value that was NaN or infinite."""

Histograms = Mapping[str, Mapping[int, int]]
"""Metric name -> number -> how often."""


class Sink(Protocol):
    """Somewhere that metrics are written to."""

    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Write the metrics of one learner step."""

    def close(self) -> None:
        """Write what is left and let go of files; may be called twice."""


class Recorder:
    """Merges values between two learner steps and writes them as one flat mapping.

    Times and rates count from construction, so make it when training starts. All methods may be
    called from any thread; ``flush`` from one at a time.

    Args:
        sinks: written in this order.
        clock: seconds that never go back.
        seconds_before: of a run that goes on, added to all times.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        clock: Callable[[], float] = time.monotonic,
        seconds_before: float = 0.0,
    ) -> None:
        self._sinks = tuple(sinks)
        self._clock = clock
        self._interval_start = clock()
        self._start = self._interval_start - seconds_before
        self._lock = threading.Lock()
        self._step: int | None = None
        self._gauges: dict[str, float] = {}
        self._values: dict[str, Accumulator] = {}
        self._counts: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._parts: dict[str, dict[str, float]] = {}
        self._kinds: dict[str, type] = {}

    def record(self, name: str, value: SupportsFloat | Accumulator) -> None:
        """Merge ``value`` into the current interval.

        An accumulator merges by its own rule; of plain numbers the last one counts. A ``Histogram``
        gives ``name/mean``, ``name/p95``, ``name/max`` and ``name/histogram``. A ``Sum`` is written
        in every later interval too, as 0 when nothing was added.

        Raises:
            ValueError: if the name is not slash-separated lower case, or was used for another kind.
        """
        with self._lock:
            self._record(name, value)

    def add(self, values: Mapping[str, SupportsFloat | Accumulator]) -> None:
        """Record every item of ``values``.

        Raises:
            ValueError: as ``record``.
        """
        with self._lock:
            for name, value in values.items():
                self._record(name, value)

    def count(self, name: str, amount: float = 1) -> None:
        """Count ``amount`` more; written as ``name_per_s`` over the interval.

        Raises:
            ValueError: as ``record``.
        """
        with self._lock:
            self._check(f"{name}_per_s", float)
            self._counts[name] = self._counts.get(name, 0) + amount
            self._totals[name] = self._totals.get(name, 0) + amount

    def record_parts(self, role: str, seconds: Mapping[str, float]) -> None:
        """Add what ``TimeLedger.take`` of one worker returned.

        Written as ``idle/<role>/<part>_fraction``. Workers of a role are averaged by the time that
        each reported, so the fractions of a role add up to 1.

        Raises:
            ValueError: as ``record``.
        """
        with self._lock:
            parts = self._parts.setdefault(role, {})
            for part, spent in seconds.items():
                self._check(f"idle/{role}/{part}_fraction", float)
                parts[part] = parts.get(part, 0.0) + spent

    def totals(self) -> dict[str, float]:
        """Return all counts and sums since construction, by the name they were recorded under."""
        with self._lock:
            return dict(self._totals)

    def flush(
        self, step: int, *, extra: Mapping[str, SupportsFloat | Accumulator] | None = None
    ) -> dict[str, float | None]:
        """Write the interval that ends now to every sink and start the next one.

        Args:
            step: the learner step that ended.
            extra: recorded first, as by ``add``.

        Returns:
            What was written, without the histograms; values that were NaN or infinite are None and
            counted in ``nonfinite_values``.

        Raises:
            ValueError: as ``record``, and if ``step`` was written before.
        """
        if self._step is not None and step <= self._step:
            raise ValueError(
                f"step {step} comes after step {self._step}; record late values before the flush "
                "of their step, or with the next one"
            )
        self.add(extra or {})
        with self._lock:
            scalars, histograms = self._close_interval()
        self._step = step
        metrics: dict[str, float | None] = {"step": step, **_strict(scalars)}
        for sink in self._sinks:
            sink.write(step, metrics=metrics, histograms=histograms)
        return metrics

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def _check(self, name: str, kind: type) -> None:
        known = self._kinds.get(name)
        if known is kind:
            return
        if known is not None:
            raise ValueError(
                f"{name} was recorded as {known.__name__} before, now as {kind.__name__}; "
                "use one kind for a name"
            )
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"metric name {name!r} must be words of a-z, 0-9 and _ separated by slashes"
            )
        self._kinds[name] = kind

    def _record(self, name: str, value: SupportsFloat | Accumulator) -> None:
        if not isinstance(value, Mean | Std | Sum | Max | Histogram):
            self._check(name, float)
            self._gauges[name] = _number(value)
            return
        self._check(name, type(value))
        merged: Any = self._values.get(name)
        if merged is None:
            merged = self._values[name] = type(value)()
        merged.merge(value)
        if isinstance(value, Sum):
            self._totals[name] = self._totals.get(name, 0) + value.total

    def _close_interval(self) -> tuple[dict[str, float], dict[str, dict[int, int]]]:
        """Return the scalars and histograms of the interval, and empty it."""
        now = self._clock()
        seconds = now - self._interval_start
        self._interval_start = now
        scalars, self._gauges = self._gauges, {}
        histograms: dict[str, dict[int, int]] = {}
        for name, accumulator in self._values.items():
            value = accumulator.value()
            if value is None:
                continue
            if isinstance(accumulator, Histogram):
                scalars[f"{name}/mean"] = value
                scalars[f"{name}/p95"] = _number(accumulator.percentile(95))
                scalars[f"{name}/max"] = _number(accumulator.max)
                histograms[f"{name}/histogram"] = ordered(accumulator.counts)
            else:
                scalars[name] = _number(value)
        self._values = {name: type(merged)() for name, merged in self._values.items()}
        for name, amount in self._counts.items():
            scalars[f"{name}_per_s"] = amount / seconds if seconds > 0 else math.nan
        self._counts = dict.fromkeys(self._counts, 0)
        for role, parts in self._parts.items():
            for part, fraction in fractions(parts).items():
                scalars[f"idle/{role}/{part}_fraction"] = fraction
        self._parts = {}
        return {
            "time_s": now - self._start,
            **dict(sorted(scalars.items(), key=_order)),
        }, histograms


def _order(item: tuple[str, float]) -> tuple[bool, str]:
    """Sort names without a slash first."""
    return "/" in item[0], item[0]


def _number(value: Any) -> float:
    """Return ``value`` as a Python number; integers stay integers."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _strict(scalars: Mapping[str, float]) -> dict[str, float | None]:
    """Replace NaN and infinities by None and add their number."""
    out = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    out["nonfinite_values"] = sum(value is None for value in out.values())
    return out
