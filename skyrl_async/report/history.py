"""All metrics of a run in columns, read as they are written, and drawn from buckets of steps."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BUCKETS = 512
"""Points of a drawn line; with more steps, each stands for a power of two of them."""

STALENESS = "staleness/histogram"
"""Metric that says how many tokens of each staleness a step trained."""

_CHUNK_BYTES = 8 << 20


class History:
    """Takes in the lines of ``metrics.jsonl`` and answers with as many points as a chart can show.

    A bucket is ``stride`` consecutive steps; ``stride`` is a power of two, so buckets that are full
    never change while it stays the same.

    Example::

        history = History()
        history.extend(rows)
        history.series()["values"]["reward/mean"]["mean"]
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._lags: list[dict[int, int]] = []
        self.num_rows = 0

    @property
    def stride(self) -> int:
        """Steps of one bucket."""
        buckets = max(1, math.ceil(self.num_rows / MAX_BUCKETS))
        return int(2 ** math.ceil(math.log2(buckets)))

    @property
    def names(self) -> list[str]:
        """Metrics seen so far, without the histogram."""
        return sorted(self._columns)

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the metrics of some steps; what is no number leaves a gap."""
        names = self._columns.keys() | {name for row in rows for name in row if name != STALENESS}
        for name in names:
            values: list[Any] = [row.get(name) for row in rows]
            numbers = [v if type(v) in (float, int) else math.nan for v in values]
            column = self._columns.get(name)
            if column is None:
                if all(type(v) not in (float, int) for v in values):
                    continue
                column = self._columns[name] = array("d", [math.nan]) * self.num_rows
            column.extend(numbers)
        self.num_rows += len(rows)
        for row in rows:
            lags = row.get(STALENESS)
            self._lags.append({int(k): int(v) for k, v in lags.items()} if lags else {})

    def last(self, name: str) -> float | None:
        """Return the newest value of a metric, None if it has none."""
        found = self._numbers(name)
        return float(found[-1]) if len(found) else None

    def last_row(self) -> dict[str, float | None]:
        """Return the metrics of the newest step; None for one that it lacks."""
        newest = {name: column[-1] for name, column in self._columns.items() if column}
        return {name: value if math.isfinite(value) else None for name, value in newest.items()}

    def mean(self, name: str, *, last_fraction: float = 1.0) -> float | None:
        """Return the mean of a metric over the last steps that have it, None if none does."""
        column = self._column(name)
        found = column[-max(1, math.ceil(len(column) * last_fraction)) :]
        found = found[np.isfinite(found)]
        return float(found.mean()) if len(found) else None

    def total(self, name: str) -> float:
        """Return the sum of a metric."""
        return float(self._numbers(name).sum())

    def nonzero_steps(self, name: str) -> list[int]:
        """Return the steps at which a metric was neither absent nor 0."""
        column, steps = self._column(name), self._column("step")
        hit = np.isfinite(column) & (column != 0)
        return [int(step) for step in steps[hit]]

    def time_shares(self, role: str) -> dict[str, float]:
        """Return the share of each part of a role's wall time over the whole run."""
        prefix, suffix = f"idle/{role}/", "_fraction"
        seconds = np.diff(self._column("time_s"), prepend=0.0).clip(min=0)
        spent: dict[str, float] = {}
        for name in self._columns:
            if name.startswith(prefix) and name.endswith(suffix):
                column = np.nan_to_num(self._column(name))
                spent[name[len(prefix) : -len(suffix)]] = float((column * seconds).sum())
        total = sum(spent.values())
        return {part: s / total for part, s in spent.items()} if total > 0 else {}

    def staleness(self, *, max_bins: int = 12) -> dict[str, Any]:
        """Return the trained tokens by staleness, over the whole run and bucket by bucket.

        Returns:
            ``labels`` of the bins (single numbers, then ranges if there are more than
            ``max_bins``), ``tokens`` of each, and ``shares``: of each bucket, of each bin.
        """
        largest = max((max(lags) for lags in self._lags if lags), default=-1)
        edges = bin_edges(largest, max_bins=max_bins)
        stride, num_bins = self.stride, len(edges) - 1
        counts = np.zeros((math.ceil(self.num_rows / stride), max(num_bins, 1)))
        bins = np.searchsorted(edges, np.arange(largest + 1), side="right") - 1
        for row, lags in enumerate(self._lags):
            for lag, number in lags.items():
                counts[row // stride, bins[lag]] += number
        sums = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)
        return {
            "labels": [
                str(low) if low + 1 == high else f"{low} to {high - 1}"
                for low, high in pairwise(edges)
            ],
            "tokens": [int(n) for n in counts.sum(axis=0)][:num_bins],
            "shares": shares.round(4)[:, :num_bins].tolist(),
        }

    def staleness_counts(self) -> dict[int, int]:
        """Return the trained tokens of the whole run by staleness."""
        total: Counter[int] = Counter()
        for lags in self._lags:
            total.update(lags)
        return dict(sorted(total.items()))

    def series(self, *, first_bucket: int = 0) -> dict[str, Any]:
        """Return all metrics bucket by bucket, as values of JSON.

        Args:
            first_bucket: buckets before it are left out.

        Returns:
            ``stride``, ``first``, ``rows``, and by metric ``mean``, and ``low`` and ``high`` where
            they differ; None where a metric is absent. ``step`` and ``time_s``
            have the value at the end of each bucket.
        """
        stride = self.stride
        start = first_bucket * stride
        values = {}
        for name in self._columns:
            column = self._column(name)[start:]
            if name in ("step", "time_s"):
                ends = [*range(stride - 1, len(column), stride)]
                if len(column) and len(column) % stride:
                    ends.append(len(column) - 1)
                values[name] = {"mean": [round(v, 3) for v in column[ends].tolist()]}
            else:
                values[name] = _bucketed(column, stride)
        return {"stride": stride, "first": first_bucket, "rows": self.num_rows, "values": values}

    def _column(self, name: str) -> NDArray[np.float64]:
        return np.array(self._columns.get(name, ()), dtype=np.float64)

    def _numbers(self, name: str) -> NDArray[np.float64]:
        column = self._column(name)
        return column[np.isfinite(column)]


def bin_edges(largest: int, *, max_bins: int) -> list[int]:
    """Return edges of bins for ``0 .. largest``: single numbers, then ranges that grow.

    Raises:
        ValueError: if there are less than two bins to divide it into.
    """
    if max_bins < 2:
        raise ValueError(f"max_bins must be >= 2, got {max_bins}")
    if largest < max_bins:
        return [*range(largest + 2)]
    end, singles = largest + 1, max(1, max_bins // 2)
    edges = [*range(singles + 1)]
    for number in range(singles + 1, max_bins + 1):
        grown = singles * (end / singles) ** ((number - singles) / (max_bins - singles))
        # Every bin after this one has at least one number too.
        edges.append(min(max(edges[-1] + 1, round(grown)), end - (max_bins - number)))
    return edges


class MetricsFile:
    """Reads ``metrics.jsonl`` as it grows; what was read is never read again.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self.history = History()

    def poll(self) -> History:
        """Take in the lines that were added, and return the history.

        A file that became shorter or was replaced, as by a run that goes on from an earlier step,
        is read anew.
        """
        try:
            with open(self._path, "rb") as file:
                found = self._path.stat()
                if found.st_size < self._offset or found.st_ino != self._inode:
                    self.history, self._offset, self._inode = History(), 0, found.st_ino
                file.seek(self._offset)
                while chunk := file.read(_CHUNK_BYTES):
                    whole = chunk[: chunk.rfind(b"\n") + 1] or chunk + file.readline()
                    if not whole.endswith(b"\n"):
                        break
                    self._take(whole)
                    self._offset += len(whole)
                    file.seek(self._offset)
        except FileNotFoundError:
            pass
        return self.history

    def _take(self, lines: bytes) -> None:
        rows = []
        for line in lines.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        self.history.extend(rows)


def _bucketed(column: NDArray[np.float64], stride: int) -> dict[str, list[float | None]]:
    """Return mean, least and largest of every ``stride`` values; gaps are left out of them."""
    if stride == 1:
        return {"mean": _rounded(column)}
    padding = -len(column) % stride
    rows = np.concatenate([column, np.full(padding, np.nan)]).reshape(-1, stride)
    missing = ~np.isfinite(rows)
    number = (~missing).sum(axis=1)
    sums = np.where(missing, 0.0, rows).sum(axis=1)
    empty = number == 0
    mean = np.where(empty, np.nan, sums / np.maximum(number, 1))
    low = np.where(missing, np.inf, rows).min(axis=1, initial=np.inf)
    high = np.where(missing, -np.inf, rows).max(axis=1, initial=-np.inf)
    bucketed = {"mean": _rounded(mean), "low": _rounded(low), "high": _rounded(high)}
    if bucketed["low"] == bucketed["high"]:
        return {"mean": bucketed["mean"]}
    return bucketed


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Return values with four significant digits; None for what is not finite."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.tolist()]
