"""What the page of a sweep shows: rewards against the swept axis, for each method, over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skyrl_async.metrics.formatting import duration, number
from skyrl_async.sweep.rows import Row, read_rows
from skyrl_async.sweep.statistics import has_collapsed, interval

SEED = "seed"
"""Axis over which means are taken."""

MAX_POINTS = 256
"""Of a drawn line."""

_PREFERRED_AXIS = "lag"


def sweep_content(folder: Path) -> dict[str, Any]:
    """Return the content of the page of a sweep's folder, as values of JSON.

    The horizontal axis is ``lag`` if there is one, else the last axis with several numbers; runs
    that differ in the others are lines of their own, and seeds are averaged.

    Raises:
        ValueError: if there are no rows.
    """
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"{folder}: holds no finished run of a sweep yet")
    axis, others = axes_of(rows)
    xs = sorted({row.cell.get(axis) for row in rows}, key=_order) if axis else [None]
    cells: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        line = ", ".join(f"{row.cell.get(name)}" for name in others) or "all runs"
        cells.setdefault(line, {}).setdefault(row.cell.get(axis) if axis else None, []).append(row)
    finished = [row for row in rows if _rewarded(row)]
    return {
        "kind": "sweep",
        "name": folder.name,
        "folder": str(folder),
        "tiles": _tiles(rows, finished),
        "axis": axis or "",
        "lines_are": ", ".join(others),
        "labels": [f"{x}" for x in xs],
        "band": _band_words(),
        "against_axis": _against_axis(cells, xs),
        "over_steps": [_over_steps(cells, x) for x in xs],
        "cells": [_cell(line, x, of.get(x, [])) for line, of in cells.items() for x in xs],
        "failed": [_failure(row) for row in rows if row.status == "failed"],
        "command": rows[-1].command,
        "commits": sorted({row.commit for row in rows}),
    }


def axes_of(rows: Sequence[Row]) -> tuple[str | None, list[str]]:
    """Return the horizontal axis, if there is one, and the others that have several values."""
    names = list(dict.fromkeys(name for row in rows for name in row.cell))
    varied = [
        name
        for name in names
        if name != SEED and len({_order(row.cell.get(name)) for row in rows}) > 1
    ]
    numeric = [name for name in varied if all(_is_number(row.cell.get(name)) for row in rows)]
    last = numeric[-1] if numeric else None
    axis = _PREFERRED_AXIS if _PREFERRED_AXIS in numeric else last
    return axis, [name for name in varied if name != axis]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort numbers by size, and before texts."""
    return not _is_number(value), float(value) if _is_number(value) else 0.0, f"{value}"


def _rewarded(row: Row) -> bool:
    return row.status == "finished" and _reward(row) is not None


def _reward(row: Row) -> float | None:
    return row.reward if row.reward is not None else row.reward_final


def _tiles(rows: Sequence[Row], finished: Sequence[Row]) -> list[dict[str, Any]]:
    failed, collapsed = len(rows) - len(finished), sum(has_collapsed(row) for row in finished)
    spent = sum(row.total_seconds or 0.0 for row in rows)
    best = max(finished, key=lambda row: _reward(row) or 0.0, default=None)
    tiles = [("runs", f"{len(finished)}", "finished", True)]
    tiles.append(("failed", f"{failed}", "see below" if failed else "", not failed))
    tiles.append(("collapsed", f"{collapsed}", "ended below half of their best", not collapsed))
    tiles.append(("time", duration(spent), "of all runs together", True))
    if best is not None:
        place = ", ".join(f"{name} {value}" for name, value in best.cell.items())
        tiles.append(("best reward", number(_reward(best)), place, True))
    names = ("label", "value", "note", "good")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


def _band(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, and the ends of its interval, or least and largest without SciPy."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    try:
        found = interval(values)
    except ImportError:
        mean = math.fsum(values) / len(values)
        return {"mean": _short(mean), "low": _short(min(values)), "high": _short(max(values))}
    return {"mean": _short(found.mean), "low": _short(found.low), "high": _short(found.high)}


def _band_words() -> str:
    try:
        interval([0.0, 1.0])
    except ImportError:
        return "The bands go from the least to the largest seed."
    return "The bands are 95 % confidence intervals of the mean over seeds (Student's t)."


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _mean_of(name: str) -> Callable[[Row], float | None]:
    def mean(row: Row) -> float | None:
        values = [v for v in row.series.get(name, ()) if v is not None]
        return math.fsum(values) / len(values) if values else None

    return mean


def _against_axis(
    cells: dict[str, dict[Any, list[Row]]], xs: Sequence[Any]
) -> list[dict[str, Any]]:
    quantities: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("final reward", "", _reward),
        ("effective sample size", "fraction", _mean_of("offpolicy/ess_fraction")),
        ("KL of behavior to proximal", "nats", _mean_of("offpolicy/kl_behavior")),
    )
    charts = []
    for title, unit, value in quantities:
        lines = []
        for line, by_x in cells.items():
            bands = [
                _band([v for r in by_x.get(x, []) if _rewarded(r) and (v := value(r)) is not None])
                for x in xs
            ]
            data = {part: [band[part] for band in bands] for part in ("mean", "low", "high")}
            lines.append({"label": line, "data": data})
        charts.append({"title": title, "unit": unit, "lines": lines})
    return charts


def _over_steps(cells: dict[str, dict[Any, list[Row]]], x: Any) -> dict[str, Any]:
    """Return the mean reward over seeds by step, of every line, at one place of the axis."""
    lines, longest = {}, 0
    for line, by_x in cells.items():
        series = [list(row.series.get("reward/mean", ())) for row in by_x.get(x, [])]
        means = []
        for step in range(max((len(s) for s in series), default=0)):
            values = [v for s in series if step < len(s) and (v := s[step]) is not None]
            means.append(math.fsum(values) / len(values) if values else None)
        lines[line], longest = means, max(longest, len(means))
    stride = max(1, math.ceil(longest / MAX_POINTS))
    steps = [min(longest, start + stride) for start in range(0, longest, stride)]
    return {
        "label": f"{x}",
        "steps": steps,
        "lines": [
            {"label": line, "data": {"mean": _thinned(means, stride, len(steps))}}
            for line, means in lines.items()
            if means
        ],
    }


def _thinned(values: Sequence[float | None], stride: int, count: int) -> list[float | None]:
    out: list[float | None] = []
    for start in range(0, count * stride, stride):
        known = [v for v in values[start : start + stride] if v is not None]
        out.append(_short(math.fsum(known) / len(known)) if known else None)
    return out


def _cell(line: str, x: Any, rows: Sequence[Row]) -> dict[str, Any]:
    rewards = [r for row in rows if _rewarded(row) and (r := _reward(row)) is not None]
    return {
        "line": line,
        "x": f"{x}",
        **_band(rewards),
        "seeds": len(rewards),
        "collapsed": sum(has_collapsed(row) for row in rows if _rewarded(row)),
        "failed": sum(row.status == "failed" for row in rows),
    }


def _failure(row: Row) -> dict[str, Any]:
    cell = ", ".join(f"{name} {value}" for name, value in row.cell.items())
    return {"cell": cell, "error": row.error or "", "attempts": row.attempts}
