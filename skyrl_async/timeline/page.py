"""The timeline as one HTML file with everything in it; it asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from skyrl_async.timeline.arrows import arrows
from skyrl_async.timeline.reader import Span, Trace, TraceLane

MAX_SPANS = 400_000
"""On the page; of a longer run, slots are left out, the last ones first."""

_ASSETS = files(__package__) / "assets"
_SCRIPTS = ("model.js", "paint.js", "view.js", "pointer.js")


def page(trace: Trace, *, title: str, note: str = "") -> str:
    """Return the page.

    Args:
        trace: of the run.
        title: of the page.
        note: one line below it, such as the largest waste.
    """
    style = (_ASSETS / "timeline.css").read_text(encoding="utf-8")
    parts = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\n}})();\n'
    # The page may run its own script and nothing else, so no text of a run can become one.
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    text = (_ASSETS / "timeline.html").read_text(encoding="utf-8")
    for mark, value in (
        ("@POLICY@", policy),
        ("@TITLE@", html.escape(title)),
        ("@NOTE@", html.escape(note)),
        ("@STYLE@", style),
        ("@SCRIPT@", script),
        ("@DATA@", _embedded(page_data(trace))),
    ):
        text = text.replace(mark, value)
    return text


def page_data(trace: Trace, *, max_spans: int = MAX_SPANS) -> dict[str, Any]:
    """Return what the page draws, as values of JSON; times are microseconds.

    Each lane has columns of equal length, in order of the spans' starts: ``start`` (the difference
    to the one before), ``duration``, ``name`` (an index into ``names``), ``level`` (how many spans
    are around it) and ``args`` (an index into ``args``, whose first entry is for none).

    Args:
        trace: of the run.
        max_spans: that the page should have at most.
    """
    shown = _shown_lanes(trace.lanes, max_spans)
    names: dict[str, int] = {}
    args: dict[str, int] = {"{}": 0}
    lanes = [_lane(trace.lanes[number], names, args) for number in shown]
    position = {number: place for place, number in enumerate(shown)}
    flows = [
        {
            "version": arrow.policy_version,
            "engine": arrow.engine,
            "stops": [[position[stop.lane], round(stop.time_s * 1e6)] for stop in arrow.stops],
        }
        for arrow in arrows(trace)
    ]
    return {
        "end": round(trace.end_s * 1e6),
        "sections": [round(start * 1e6) for start in trace.sections],
        "names": list(names),
        "args": [json.loads(one) for one in args],
        "lanes": lanes,
        "flows": flows,
        "left_out": len(trace.lanes) - len(shown),
    }


def _shown_lanes(lanes: Sequence[TraceLane], max_spans: int) -> list[int]:
    """Return the numbers of the lanes that the page has room for."""
    numbers = list(range(len(lanes)))
    slots = [number for number in numbers if lanes[number].role == "slot"]
    # Every actor keeps its first slots: they were made in this order.
    order = {number: _rank_in_process(lanes, number) for number in slots}
    total = sum(len(lane.spans) for lane in lanes)
    left_out = set()
    for number in sorted(slots, key=lambda n: order[n], reverse=True):
        if total <= max_spans:
            break
        total -= len(lanes[number].spans)
        left_out.add(number)
    return [number for number in numbers if number not in left_out]


def _rank_in_process(lanes: Sequence[TraceLane], number: int) -> int:
    process = lanes[number].process
    return sum(lane.role == "slot" and lane.process == process for lane in lanes[:number])


def _lane(lane: TraceLane, names: dict[str, int], args: dict[str, int]) -> dict[str, Any]:
    starts, durations, name_numbers, arg_numbers = [], [], [], []
    last = 0
    for span in lane.spans:
        start = round(span.start_s * 1e6)
        starts.append(start - last)
        durations.append(round(span.end_s * 1e6) - start)
        name_numbers.append(names.setdefault(span.name, len(names)))
        arg_numbers.append(args.setdefault(_key(span.args), len(args)))
        last = start
    return {
        "process": lane.process,
        "role": lane.role,
        "label": lane.name,
        "start": starts,
        "duration": durations,
        "name": name_numbers,
        "args": arg_numbers,
        "level": levels(lane.spans),
        "instants": [[i.name, round(i.time_s * 1e6), dict(i.args)] for i in lane.instants],
    }


def levels(spans: Sequence[Span]) -> list[int]:
    """Return for each span how many are around it.

    Args:
        spans: by start, longer ones first.
    """
    found = []
    open_ends: list[float] = []
    for span in spans:
        # A span that ends after the one before it is beside it, whatever the last digits say.
        while open_ends and (open_ends[-1] <= span.start_s or open_ends[-1] < span.end_s):
            open_ends.pop()
        found.append(len(open_ends))
        open_ends.append(span.end_s)
    return found


def _key(args: Mapping[str, int | float | str]) -> str:
    return json.dumps(dict(args), separators=(",", ":"), allow_nan=False) if args else "{}"


def _embedded(content: Any) -> str:
    """Return JSON that can stand in a script element: no character in it can end that."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
