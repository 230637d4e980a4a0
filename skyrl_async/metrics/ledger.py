"""Where the wall time of a role goes, in named parts that add up to all of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from skyrl_async.metrics.trace import NULL_LANE, Lane


class TimeLedger:
    """Splits the wall time of one worker into parts; exactly one part runs at any time.

    The first part runs from construction on. Inner parts are not counted in outer ones. Switching
    belongs to one thread of activity (parts of interleaved asyncio tasks would end each other), but
    ``take`` may be called from another thread.

    With a lane, every part is a span of the timeline as well.

    Example::

        ledger = TimeLedger("learner", parts=("other", "wait_batch", "train"))
        with ledger.part("wait_batch"):
            batch = next(batches)
        ledger.switch_to("train")
        ...
        recorder.record_parts("learner", ledger.take())

    Raises:
        ValueError: without parts, or if one is named twice.
    """

    __slots__ = (
        *("_clock", "_current", "_lane", "_lock", "_seconds", "_since"),
        *("_span_since", "role"),
    )

    def __init__(
        self,
        role: str,
        *,
        parts: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        lane: Lane = NULL_LANE,
    ) -> None:
        if not parts or len(set(parts)) != len(parts):
            raise ValueError(f"parts of {role!r} must be one or more different names, got {parts}")
        self.role = role
        self._seconds = dict.fromkeys(parts, 0.0)
        self._current = parts[0]
        self._clock = clock
        self._since = self._span_since = clock()
        self._lane = lane
        self._lock = threading.Lock()

    @property
    def current(self) -> str:
        """The part that runs now."""
        return self._current

    @property
    def since_s(self) -> float:
        """When the running part began, on the ledger's clock."""
        return self._span_since

    def switch_to(self, part: str) -> None:
        """End the running part and start ``part``.

        Raises:
            ValueError: if the ledger has no such part.
        """
        with self._lock:
            if part not in self._seconds:
                raise ValueError(
                    f"the ledger of {self.role!r} has no part {part!r}; it has "
                    f"{', '.join(self._seconds)}"
                )
            now = self._clock()
            self._seconds[self._current] += now - self._since
            self._since = now
            if part != self._current:
                self._lane.span(self._current, self._span_since, now)
                self._span_since = now
                self._current = part

    def part(self, name: str) -> _Part:
        """Return a context in which ``name`` runs; the part before it goes on afterwards."""
        return _Part(self, name)

    def detail(self, name: str) -> _Detail:
        """Return a context that is a span of the timeline, within the running part."""
        return _Detail(self._lane, name, self._clock)

    def take(self) -> dict[str, float]:
        """Return the seconds of every part since the last call, the running part up to now."""
        with self._lock:
            now = self._clock()
            self._seconds[self._current] += now - self._since
            self._since = now
            taken = self._seconds
            self._seconds = dict.fromkeys(taken, 0.0)
        return taken


class _Part:
    """Context of ``TimeLedger.part``; a generator would cost twice the time."""

    __slots__ = ("_before", "_ledger", "_name")

    def __init__(self, ledger: TimeLedger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._before = ""

    def __enter__(self) -> None:
        self._before = self._ledger.current
        self._ledger.switch_to(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ledger.switch_to(self._before)


class _Detail:
    """Context of ``TimeLedger.detail``."""

    __slots__ = ("_clock", "_lane", "_name", "_since")

    def __init__(self, lane: Lane, name: str, clock: Callable[[], float]) -> None:
        self._lane = lane
        self._name = name
        self._clock = clock
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = self._clock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lane.span(self._name, self._since, self._clock())


def fractions(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of all seconds; the shares add up to 1, none if no time passed."""
    total = sum(seconds.values())
    return {part: spent / total for part, spent in seconds.items()} if total > 0 else {}


class PartTotals:
    """Where the wall time of every role went in a whole run, from its first step to its last.

    What was reported before the first step is start-up, and what comes after the last one is the
    end of the run; neither counts.

    ::

        totals = PartTotals()
        totals.add("learner", result.seconds)
        totals.add("actor", report.seconds)
        totals.end_step()
        shares = totals.fractions()
    """

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = {}
        self._pending: dict[str, dict[str, float]] = {}
        self._started = False

    def add(self, role: str, seconds: Mapping[str, float]) -> None:
        """Add what one worker reported; workers of a role are averaged by their time."""
        _add(self._pending, role, seconds)

    def end_step(self) -> None:
        """Count what was reported since the step before."""
        pending, self._pending = self._pending, {}
        if self._started:
            for role, seconds in pending.items():
                _add(self._seconds, role, seconds)
        self._started = True

    def fractions(self) -> dict[str, dict[str, float]]:
        """Return role -> part -> share of the role's time; roles without any are left out."""
        shares = {role: fractions(seconds) for role, seconds in self._seconds.items()}
        return {role: parts for role, parts in shares.items() if parts}

    def state(self) -> dict[str, dict[str, float]]:
        """Return role -> part -> seconds, to go on from after a step."""
        return {role: dict(seconds) for role, seconds in self._seconds.items()}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from what :meth:`state` returned.

        Raises:
            ValueError: if a value is not a number.
            AttributeError: if it is not a mapping of mappings.
        """
        self._seconds = {
            role: {part: float(spent) for part, spent in seconds.items()}
            for role, seconds in state.items()
        }
        self._started = True


def _add(totals: dict[str, dict[str, float]], role: str, seconds: Mapping[str, float]) -> None:
    parts = totals.setdefault(role, {})
    for part, spent in seconds.items():
        parts[part] = parts.get(part, 0.0) + spent
