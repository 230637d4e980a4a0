"""The timeline in Chrome's trace event format, which Perfetto and chrome://tracing open.

Format: the *Trace Event Format* document of the Chromium project: complete events ``X``, instants
``i``, metadata ``M`` that name processes and threads, and flow events ``s``, ``t`` and ``f``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from skyrl_async.timeline.arrows import Arrow, arrows
from skyrl_async.timeline.reader import Trace, TraceLane


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """Return the whole timeline as values of JSON; times are microseconds.

    Every process of the run is a process there, and every lane a thread; ids start at 1.
    """
    processes = list(dict.fromkeys(lane.process for lane in trace.lanes))
    ids = [(processes.index(lane.process) + 1, n) for n, lane in enumerate(trace.lanes, start=1)]
    events: list[dict[str, Any]] = []
    for number, process in enumerate(processes, start=1):
        events.append(_name("process_name", number, 0, {"name": process}))
        events.append(_name("process_sort_index", number, 0, {"sort_index": number}))
    for lane, (pid, tid) in zip(trace.lanes, ids, strict=True):
        events.append(_name("thread_name", pid, tid, {"name": lane.name}))
        events.append(_name("thread_sort_index", pid, tid, {"sort_index": tid}))
        events.extend(_events(lane, pid, tid))
    for arrow in arrows(trace):
        events.extend(_flow(arrow, ids))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"start_wall_s": trace.start_wall_s},
    }


def _name(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _events(lane: TraceLane, pid: int, tid: int) -> Iterator[dict[str, Any]]:
    place = {"cat": lane.role, "pid": pid, "tid": tid}
    for span in lane.spans:
        event = {
            "ph": "X",
            "name": span.name,
            "ts": _micros(span.start_s),
            "dur": _micros(span.end_s - span.start_s),
            **place,
        }
        yield {**event, "args": dict(span.args)} if span.args else event
    for instant in lane.instants:
        event = {"ph": "i", "name": instant.name, "ts": _micros(instant.time_s), "s": "t", **place}
        yield {**event, "args": dict(instant.args)} if instant.args else event


def _flow(arrow: Arrow, ids: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield ``s``, ``t``, ``f``; each is bound to the span around it."""
    last = len(arrow.stops) - 1
    for number, stop in enumerate(arrow.stops):
        pid, tid = ids[stop.lane]
        event = {
            "ph": "s" if number == 0 else "f" if number == last else "t",
            "name": "policy version",
            "cat": "version",
            "id": f"{arrow.policy_version} to {arrow.engine} at {_micros(arrow.stops[0].time_s)}",
            "ts": _micros(stop.time_s),
            "pid": pid,
            "tid": tid,
            "args": {"policy_version": arrow.policy_version},
        }
        yield {**event, "bp": "e"} if number else event


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 1)
