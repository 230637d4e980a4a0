"""Where the wall time of a role goes, in named parts that add up to all of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType


class TimeLedger:
    """Splits the wall time of one worker into parts; exactly one part runs at any time.

    The first part runs from construction on. Inner parts are not counted in outer ones. Switching
    belongs to one thread of activity (parts of interleaved asyncio tasks would end each other), but
    ``take`` may be called from another thread.

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

    __slots__ = ("_clock", "_current", "_lock", "_seconds", "_since", "role")

    def __init__(
        self,
        role: str,
        *,
        parts: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not parts or len(set(parts)) != len(parts):
            raise ValueError(f"parts of {role!r} must be one or more different names, got {parts}")
        self.role = role
        self._seconds = dict.fromkeys(parts, 0.0)
        self._current = parts[0]
        self._clock = clock
        self._since = clock()
        self._lock = threading.Lock()

    @property
    def current(self) -> str:
        """The part that runs now."""
        return self._current

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
            self._current = part

    def part(self, name: str) -> _Part:
        """Return a context in which ``name`` runs; the part before it goes on afterwards."""
        return _Part(self, name)

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


def fractions(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of all seconds; the shares add up to 1, none if no time passed."""
    total = sum(seconds.values())
    return {part: spent / total for part, spent in seconds.items()} if total > 0 else {}
