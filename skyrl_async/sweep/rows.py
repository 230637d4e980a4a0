"""What a sweep leaves behind: a file with one line of JSON for each finished or failed run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

ROWS = "rows.jsonl"

SERIES = (
    *("step", "time_s", "reward/mean", "reward/trained_mean"),
    *("staleness/mean", "staleness/max"),
    *("offpolicy/ess_fraction", "offpolicy/kl_behavior", "offpolicy/clip_fraction"),
    *("offpolicy/masked_fraction", "policy/entropy", "policy/grad_norm"),
)
"""Metrics that are kept for every learner step."""

_DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of a sweep.

    Attributes:
        digest: of its configuration; runs of one digest do the same.
        cell: its place in the grid, value by axis.
        status: ``finished`` or ``failed``.
        error: why it failed.
        attempts: how often it was started.
        commit: of the code.
        command: that repeats it.
        overrides: of the configuration.
        config: resolved.
        seconds: of training.
        total_seconds: with start and end.
        reward: of the last policy, greedily on held-out tasks; None without.
        reward_final: of the episodes of the last tenth of the steps.
        series: values by metric, aligned with ``series["step"]``; None where a step has none.
        summary: of the run.
    """

    digest: str
    cell: Mapping[str, Any]
    status: Literal["finished", "failed"]
    error: str | None = None
    attempts: int = 1
    commit: str = "unknown"
    command: str = ""
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any]
    seconds: float | None = None
    total_seconds: float | None = None
    reward: float | None = None
    reward_final: float | None = None
    series: Mapping[str, Sequence[float | None]]
    summary: Mapping[str, Any]

    def to_json(self) -> str:
        """Return one line without its end."""
        return json.dumps(asdict(self))


_NAMES = frozenset(field.name for field in fields(Row))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file or of a sweep's folder; none if there is no file.

    A torn last line, of a sweep that was killed while it wrote, is left out. Of several rows of one
    run the last one counts.

    Raises:
        ValueError: if another line is no row.
    """
    file = path / ROWS if path.is_dir() else path
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = {k: v for k, v in json.loads(line).items() if k in _NAMES}
            row = Row(**{**values, "overrides": tuple(values.get("overrides", ()))})
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"{file}, line {number}: no row of a sweep ({error})") from None
        rows[row.digest] = row
    return list(rows.values())


def append_row(folder: Path, row: Row) -> None:
    """Add a row to a sweep's folder; it is on the disk when this returns."""
    file = folder / ROWS
    with open(file, "ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                _cut_torn_line(file)
        stream.write(row.to_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _cut_torn_line(file: Path) -> None:
    content = file.read_bytes()
    os.truncate(file, content.rfind(b"\n") + 1)


def read_series(metrics: Path) -> dict[str, list[float | None]]:
    """Return the kept metrics of a run by step.

    Args:
        metrics: ``metrics.jsonl`` of a run; without it there are none.
    """
    if not metrics.exists():
        return {}
    steps = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    return {name: [_rounded(step.get(name)) for step in steps] for name in SERIES}


def thinned(row: Row, *, every: int = 10) -> Row:
    """Return a row whose series have one value, the mean, for each ``every`` steps.

    ``step`` and ``time_s`` are those of the last of these steps.

    Raises:
        ValueError: if ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}")
    series = {
        name: [
            _condensed(values[start : start + every], last=name in ("step", "time_s"))
            for start in range(0, len(values), every)
        ]
        for name, values in row.series.items()
    }
    return replace(row, series=series)


def _condensed(values: Sequence[float | None], *, last: bool) -> float | None:
    known = [value for value in values if value is not None]
    if last or not known:
        return known[-1] if known else None
    return _rounded(math.fsum(known) / len(known))


def _rounded(value: float | int | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
