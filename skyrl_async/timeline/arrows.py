"""The way of each policy version: made by the learner, sent to an engine, loaded there."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_async.timeline.reader import Trace


@dataclass(frozen=True, slots=True)
class Stop:
    """A point that an arrow passes.

    Attributes:
        lane: index into the trace's lanes.
        time_s: seconds since the run's start.
    """

    lane: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrow:
    """One version on its way to one engine.

    Attributes:
        policy_version: on its way.
        engine: it is for.
        stops: made, sent and loaded, in the order of time; at least two of them.
    """

    policy_version: int
    engine: str
    stops: tuple[Stop, ...]


def arrows(trace: Trace) -> tuple[Arrow, ...]:
    """Return one arrow for each version and engine, by the time at which it was sent.

    A version that was replaced before it was sent has none. One that was sent twice, as to an
    engine that came back, has two.
    """
    made: dict[int, list[Stop]] = {}
    loaded: dict[tuple[int, str], list[Stop]] = {}
    sent: list[tuple[int, str, Stop]] = []
    for number, lane in enumerate(trace.lanes):
        for point in lane.flows:
            stop = Stop(number, point.time_s)
            if point.stage == "made":
                made.setdefault(point.policy_version, []).append(stop)
            elif point.stage == "sent":
                sent.append((point.policy_version, point.engine, stop))
            else:
                # The engine's own process says so, and its name is the engine's.
                engine = point.engine or lane.process
                loaded.setdefault((point.policy_version, engine), []).append(stop)
    found = []
    for version, engine, stop in sorted(sent, key=lambda item: item[2].time_s):
        before = [s for s in made.get(version, ()) if s.time_s <= stop.time_s][-1:]
        after = [s for s in loaded.get((version, engine), ()) if s.time_s >= stop.time_s][:1]
        stops = (*before, stop, *after)
        if len(stops) > 1:
            found.append(Arrow(policy_version=version, engine=engine, stops=stops))
    return tuple(found)
