"""A few seconds of the run's timeline, small enough for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_async.metrics.names import is_idle_part
from skyrl_async.metrics.trace import FOLDER
from skyrl_async.report.history import History
from skyrl_async.timeline.reader import Span, Trace, TraceLane, read_trace

STEPS_SHOWN = 5
"""Learner steps in the window, about."""

SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 0.2, 30.0
MAX_LANES = {
    **{"coordinator": 1, "learner": 2, "publisher": 3},
    **{"engine": 4, "slot": 8, "evaluation": 1},
}
"""Lanes shown of each role, in the order of the page."""

MAX_TRACE_BYTES = 24 << 20
"""Of all files of the timeline; more takes longer to read than a report may take."""

_RESOLUTION_S = 5e-6
"""Spans that overlap by less come one after the other; times are in whole microseconds."""

_POINTS = 1500
"""Spans shorter than this part of the window are drawn as one with their neighbors."""


def timeline_excerpt(folder: Path, history: History) -> dict[str, Any] | None:
    """Return lanes with their spans in a window of a few steps, None without a timeline.

    Args:
        folder: of the run.
        history: says how long a step takes.
    """
    files = list((folder / FOLDER).glob("*.jsonl"))
    if not files or sum(path.stat().st_size for path in files) > MAX_TRACE_BYTES:
        return None
    trace = read_trace(folder)
    start_s, end_s = window_of(trace, step_s=_step_s(history))
    lanes = [lane for lane in _chosen(trace.lanes) if list(_within(lane.spans, start_s, end_s))]
    if not lanes:
        return None
    return {
        "start_s": round(start_s, 3),
        "seconds": round(end_s - start_s, 4),
        "lanes": [_lane(lane, start_s, end_s) for lane in lanes],
        "flows": list(_flows(lanes, start_s, end_s)),
        "left_out": len(trace.lanes) - len(lanes),
    }


def window_of(trace: Trace, *, step_s: float) -> tuple[float, float]:
    """Return the first and last second shown: some steps around two thirds of the learner's work.

    Args:
        trace: of the run.
        step_s: seconds of a learner step.
    """
    seconds = min(max(STEPS_SHOWN * step_s, SHORTEST_WINDOW_S), LONGEST_WINDOW_S)
    work = [
        span
        for lane in trace.lanes
        if lane.role == "learner"
        for span in lane.spans
        if span.name == "train"
    ]
    if not work:
        return max(0.0, trace.end_s - seconds), trace.end_s
    middle = sorted(span.start_s for span in work)[2 * len(work) // 3]
    start_s = max(0.0, middle - seconds / 2)
    return start_s, start_s + seconds


def _step_s(history: History) -> float:
    time_s = history.last("time_s")
    return time_s / history.num_rows if time_s and history.num_rows else 1.0


def _chosen(lanes: Sequence[TraceLane]) -> Iterator[TraceLane]:
    for role, number in MAX_LANES.items():
        yield from [lane for lane in lanes if lane.role == role][:number]


def _within(spans: Sequence[Span], start_s: float, end_s: float) -> Iterator[Span]:
    return (span for span in spans if span.start_s < end_s and span.end_s > start_s)


def _lane(lane: TraceLane, start_s: float, end_s: float) -> dict[str, Any]:
    return {
        "process": lane.process,
        "role": lane.role,
        "name": lane.name,
        "spans": _rows(list(_within(lane.spans, start_s, end_s)), start_s, end_s),
    }


def _rows(spans: Sequence[Span], start_s: float, end_s: float) -> list[list[Any]]:
    """Return name, begin, end, depth, whether it waits, and more in words, of every drawn span.

    Begin and end are in seconds of the window; spans inside others are one deeper.
    """
    shortest = (end_s - start_s) / _POINTS
    rows: list[list[Any]] = []
    open_ends: list[float] = []
    for span in spans:
        while open_ends and span.start_s >= open_ends[-1] - _RESOLUTION_S:
            open_ends.pop()
        depth = len(open_ends)
        open_ends.append(span.end_s)
        begin, end = max(span.start_s, start_s) - start_s, min(span.end_s, end_s) - start_s
        before = rows[-1] if rows else None
        close = before is not None and begin - before[2] < shortest and before[3] == depth
        if before is not None and close and end - begin < shortest > before[2] - before[1]:
            before[2] = round(max(end, before[2]), 5)
            before[5] = "several short spans"
            continue
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in span.args.items())
        waits = is_idle_part(span.name)
        rows.append([span.name, round(begin, 5), round(end, 5), depth, waits, words])
    return rows


def _flows(lanes: Sequence[TraceLane], start_s: float, end_s: float) -> Iterator[list[Any]]:
    """Yield policy version, stage, index of the lane and second, of versions in the window."""
    for index, lane in enumerate(lanes):
        for point in lane.flows:
            if start_s <= point.time_s <= end_s:
                second = round(point.time_s - start_s, 5)
                yield [point.policy_version, point.stage, index, second]
