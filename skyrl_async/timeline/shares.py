"""What part of its time each lane, and each role, spends on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skyrl_async.timeline.reader import COORDINATOR, Span, Trace, TraceLane

IDLE = "idle"
"""The time in which a lane has no span; a slot then waits for admission."""


def own_seconds(spans: Sequence[Span], *, start_s: float, end_s: float) -> dict[str, float]:
    """Return the seconds of each name in a window, without those of spans inside.

    Args:
        spans: by start, longer ones first; each is beside the others or inside of one. Where two
            cross, the later one counts from the end of the first.
        start_s: of the window.
        end_s: of it.

    Returns:
        Seconds by name; those under ``idle`` are of no span, and all add up to the window.

    Raises:
        ValueError: if the window ends before it starts.
    """
    if end_s < start_s:
        raise ValueError(f"the window {start_s}..{end_s} s ends before it starts")
    whole = _Open(IDLE, end_s=end_s, limit_s=end_s, filled_s=start_s)
    seconds = {IDLE: end_s - start_s}
    around = [whole]
    for span in spans:
        while len(around) > 1 and not around[-1].contains(span):
            around.pop()
        outer = around[-1]
        begin, end = max(span.start_s, outer.filled_s), min(span.end_s, outer.limit_s)
        if end <= begin:
            continue
        outer.filled_s = end
        seconds[outer.name] -= end - begin
        seconds[span.name] = seconds.get(span.name, 0.0) + end - begin
        around.append(_Open(span.name, end_s=span.end_s, limit_s=end, filled_s=begin))
    return {name: max(0.0, spent) for name, spent in seconds.items()}


@dataclass(slots=True, kw_only=True)
class _Open:
    """A span that others may be inside of: they have its time up to ``filled_s``.

    ``limit_s`` is its end, or that of the window.
    """

    name: str = field(kw_only=False)
    end_s: float
    limit_s: float
    filled_s: float

    def contains(self, span: Span) -> bool:
        return span.start_s < self.end_s and span.end_s <= self.end_s


def lane_shares(lane: TraceLane, *, start_s: float, end_s: float) -> dict[str, float]:
    """Return each name's share of the window; they add up to 1, and are none for an empty one."""
    seconds = own_seconds(lane.spans, start_s=start_s, end_s=end_s)
    total = sum(seconds.values())
    return {name: spent / total for name, spent in seconds.items()} if total > 0 else {}


def role_shares(
    trace: Trace, *, start_s: float = 0.0, end_s: float | None = None
) -> Mapping[str, Mapping[str, float]]:
    """Return role -> name -> share of the time of all lanes of the role; each adds up to 1.

    The coordinator is left out: it waits for the others, so its time is nobody's work or waste.

    Args:
        trace: of the run.
        start_s: of the window.
        end_s: of it; the end of the trace without one.
    """
    end = trace.end_s if end_s is None else end_s
    totals: dict[str, dict[str, float]] = {}
    for lane in trace.lanes:
        if lane.role == COORDINATOR:
            continue
        parts = totals.setdefault(lane.role, {})
        for name, share in lane_shares(lane, start_s=start_s, end_s=end).items():
            parts[name] = parts.get(name, 0.0) + share
    return {
        role: {name: share / sum(parts.values()) for name, share in parts.items()}
        for role, parts in totals.items()
        if parts
    }
