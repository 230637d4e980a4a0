"""Reads what the processes of a run wrote to its timeline, on one clock.

::

    trace = read_trace(Path("runs/number_guess-20260101-120000"))
    for lane in trace.lanes:
        print(lane.process, lane.name, sum(span.end_s - span.start_s for span in lane.spans))
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_async.metrics.trace import FOLDER, FlowStage

logger = logging.getLogger(__name__)

COORDINATOR = "coordinator"
"""Process and role of what hands records on: above all others, and not among the shares."""

_NO_ARGS: Mapping[str, int | float | str] = {}
_VALUE_NAMES = {"generate": "tokens"}
"""What the number of a span in a chain says, by the span's name."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        name: what.
        start_s: seconds since the run's start.
        end_s: likewise.
        args: more about it, such as ``policy_version``.
    """

    name: str
    start_s: float
    end_s: float
    args: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Seconds that it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment; see :class:`Span`."""

    name: str
    time_s: float
    args: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FlowPoint:
    """Where a policy version passed.

    Attributes:
        stage: ``made`` by the learner, ``sent`` to an engine, ``loaded`` there.
        policy_version: that passed.
        time_s: seconds since the run's start.
        engine: it is on its way to; ``""`` for all.
    """

    stage: FlowStage
    policy_version: int
    time_s: float
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLane:
    """One row; its lists are in the order of time (spans: of their start, longer first).

    Attributes:
        process: of the run that wrote it, such as ``rollout actor 0``.
        role: whose time it is: ``learner``, ``engine``, ``slot``, ``publisher``,
            ``coordinator``, ...
        name: of the row within the process.
        spans: may contain each other.
        instants: moments.
        flows: where policy versions passed.
    """

    process: str
    role: str
    name: str
    spans: tuple[Span, ...]
    instants: tuple[Instant, ...]
    flows: tuple[FlowPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The timeline of a run.

    Attributes:
        lanes: by process, the coordinator first, in the order in which they were made.
        start_wall_s: when the first process began to record, seconds since 1970.
        end_s: the last event, in seconds since then.
        sections: when processes began to record, in seconds since then; those of a resumed run are
            apart from the first.
        gaps: events lost because they came too fast, as ``(process, before this second)``.
    """

    lanes: tuple[TraceLane, ...]
    start_wall_s: float
    end_s: float
    sections: tuple[float, ...] = ()
    gaps: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class _Lane:
    """A lane while it is read; a resumed run goes on with the lanes of its names."""

    process: str
    role: str
    name: str
    parts: Sequence[str] = ()
    spans: list[Span] = field(default_factory=list)
    instants: list[Instant] = field(default_factory=list)
    flows: list[FlowPoint] = field(default_factory=list)


@dataclass(slots=True)
class _Section:
    """What one process wrote: header and events."""

    header: Mapping[str, Any]
    events: list[list[Any]] = field(default_factory=list)


def read_trace(run_folder: Path) -> Trace:
    """Return the timeline of a run, also of one that goes on or was killed.

    Lines that are torn or of another form are left out, and so are spans of less than half a
    microsecond. Without any line, the trace has no lanes.

    Args:
        run_folder: of the run.
    """
    sections = [
        section
        for path in sorted((run_folder / FOLDER).glob("*.jsonl"), key=_in_numeric_order)
        for section in _sections(path)
    ]
    if not sections:
        return Trace(lanes=(), start_wall_s=0.0, end_s=0.0)
    sections.sort(key=lambda section: section.header["process"] != COORDINATOR)
    # Wall clocks may be set; where monotonic clocks are shared, they alone decide.
    wall_minus_monotonic: dict[str, float] = {}
    starts = []
    for section in sections:
        header = section.header
        offset = wall_minus_monotonic.setdefault(
            header["clock"], header["wall_s"] - header["monotonic_s"]
        )
        starts.append(offset + header["monotonic_s"])
    origin = min(starts)
    lanes: dict[tuple[str, str], _Lane] = {}
    gaps: list[tuple[str, float]] = []
    for section, start in zip(sections, starts, strict=True):
        _read_section(section, start - origin, lanes, gaps)
    return Trace(
        lanes=tuple(_finished(lane) for lane in lanes.values()),
        start_wall_s=origin,
        end_s=max((_end(lane) for lane in lanes.values()), default=0.0),
        sections=tuple(sorted(start - origin for start in starts)),
        gaps=tuple(gaps),
    )


def _sections(path: Path) -> Iterator[_Section]:
    section: _Section | None = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and _is_header(value):
                if section is not None:
                    yield section
                section = _Section(value)
            elif isinstance(value, list) and section is not None:
                section.events.append(value)
    if section is not None:
        yield section


def _is_header(value: Mapping[str, Any]) -> bool:
    return (
        value.get("trace") == 1
        and isinstance(value.get("process"), str)
        and isinstance(value.get("clock"), str)
        and isinstance(value.get("wall_s"), float)
        and isinstance(value.get("monotonic_s"), float)
    )


def _read_section(
    section: _Section,
    start_s: float,
    lanes: dict[tuple[str, str], _Lane],
    gaps: list[tuple[str, float]],
) -> None:
    process = section.header["process"]
    numbered: dict[int, _Lane] = {}
    for event in section.events:
        try:
            if event[0] == "L":
                _, number, role, name, parts = event
                lane = lanes.setdefault((process, name), _Lane(process, role, name))
                lane.parts = parts
                numbered[number] = lane
            elif event[0] == "D":
                gaps.append((process, start_s + event[1] * 1e-6))
            else:
                _READ[event[0]](numbered[event[1]], event, start_s)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            logger.debug("%s: %s is left out: %r", process, event, error)


def _read_span(lane: _Lane, event: list[Any], start_s: float) -> None:
    if not event[4]:
        return
    # Spans that touch must touch here too, so both ends are computed alike.
    begin, end = start_s + event[3] * 1e-6, start_s + (event[3] + event[4]) * 1e-6
    args = event[5] if len(event) > 5 else _NO_ARGS
    lane.spans.append(Span(event[2], begin, end, args))


def _read_instant(lane: _Lane, event: list[Any], start_s: float) -> None:
    args = event[4] if len(event) > 4 else _NO_ARGS
    lane.instants.append(Instant(event[2], start_s + event[3] * 1e-6, args))


def _read_flow(lane: _Lane, event: list[Any], start_s: float) -> None:
    _, _, stage, micros, version, engine = event
    lane.flows.append(FlowPoint(stage, version, start_s + micros * 1e-6, engine))


def _read_chain(lane: _Lane, event: list[Any], start_s: float) -> None:
    micros, flat = event[2], event[3]
    for index in range(0, len(flat), 3):
        part, duration, value = flat[index : index + 3]
        name = lane.parts[part]
        begin, micros = start_s + micros * 1e-6, micros + duration
        if not duration:
            continue
        value_name = _VALUE_NAMES.get(name)
        args = {value_name: value} if value_name else _NO_ARGS
        lane.spans.append(Span(name, begin, start_s + micros * 1e-6, args))


_READ: Mapping[str, Callable[[_Lane, list[Any], float], None]] = {
    "X": _read_span,
    "I": _read_instant,
    "F": _read_flow,
    "C": _read_chain,
}


def _finished(lane: _Lane) -> TraceLane:
    return TraceLane(
        process=lane.process,
        role=lane.role,
        name=lane.name,
        spans=tuple(sorted(lane.spans, key=lambda span: (span.start_s, -span.end_s))),
        instants=tuple(sorted(lane.instants, key=lambda instant: instant.time_s)),
        flows=tuple(sorted(lane.flows, key=lambda point: point.time_s)),
    )


def _end(lane: _Lane) -> float:
    return max(
        (
            *(span.end_s for span in lane.spans),
            *(instant.time_s for instant in lane.instants),
            *(point.time_s for point in lane.flows),
        ),
        default=0.0,
    )


def _in_numeric_order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name
