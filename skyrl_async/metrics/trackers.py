"""Experiment trackers beside the run's own files, each in a thread of its own.

A tracker is a service or a library that can be slow, fail, or hang. None of that reaches the run:
rows wait in a bounded queue, what does not fit is counted and lost, and the first failure of each
tracker is logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from skyrl_async.metrics.recorder import Histograms, Scalars

logger = logging.getLogger(__name__)

TRACKERS = ("wandb", "mlflow", "trackio")
"""Known trackers; each is also the name of its library and of the extra that installs it."""

MAX_WAITING_ROWS = 1000
CLOSE_TIMEOUT_S = 30.0
_MAX_BINS = 500
_THREAD_PREFIX = "tracker "

Status = Literal["finished", "interrupted", "failed"]
"""How a run ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about a run.

    Attributes:
        project: that the run belongs to.
        name: of the run.
        folder: of the run, for trackers that write files.
        config: nested values.
        run_id: of the tracker's run that goes on; None starts one.
    """

    project: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    run_id: str | None = None


class Tracker(Protocol):
    """One run at one tracker; used from one thread."""

    @property
    def run_id(self) -> str:
        """Name by which the run goes on later."""
        ...

    def log(self, step: int, *, metrics: Mapping[str, float], histograms: Histograms) -> None:
        """Send the metrics of one learner step; may block and may raise anything."""
        ...

    def finish(self, status: Status) -> None:
        """Send what is left and end the run."""
        ...


class TrackerSink:
    """A :class:`skyrl_async.metrics.recorder.Sink` that never blocks and never raises.

    The tracker's run is opened by the thread too, so that a slow start delays nothing. The run
    keeps the tracker's id in ``<folder>/trackers/<name>.id`` and goes on with it.

    Args:
        name: of the tracker.
        run: what it is told.
        open_run: makes the tracker.
        max_waiting: rows that wait at most; further ones are lost.
    """

    def __init__(
        self,
        name: str,
        *,
        run: TrackedRun,
        open_run: Callable[[TrackedRun], Tracker],
        max_waiting: int = MAX_WAITING_ROWS,
    ) -> None:
        self.name = name
        self._run = run
        self._open_run = open_run
        self._max_waiting = max_waiting
        self._id_file = run.folder / "trackers" / f"{name}.id"
        self._changed = threading.Condition()
        self._rows: deque[tuple[int, dict[str, float], Histograms]] = deque()
        self._status: Status | None = None
        self._sending = 0
        self._lost = 0
        self._broken = False
        self._complained = False
        self._thread = threading.Thread(target=self._work, name=_THREAD_PREFIX + name, daemon=True)
        self._thread.start()

    @property
    def lost_rows(self) -> int:
        """Steps that the tracker did not take, so far."""
        with self._changed:
            return self._lost

    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Queue the metrics of one learner step; returns at once."""
        values = {name: value for name, value in metrics.items() if value is not None}
        with self._changed:
            full = len(self._rows) >= self._max_waiting
            if self._broken or self._status is not None or full:
                self._lost += 1
            else:
                self._rows.append((step, values, histograms))
                self._changed.notify()
        if full:
            self._complain(f"has {self._max_waiting} steps waiting; newer ones are lost")

    def end(self, status: Status) -> None:
        """Let the thread end the tracker's run after what waits; returns at once."""
        with self._changed:
            self._status = self._status or status
            self._changed.notify()

    def join(self, *, timeout_s: float) -> bool:
        """Wait for the thread after :meth:`end`; return whether it has ended."""
        self._thread.join(max(timeout_s, 0.0))
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._lost += len(self._rows) + self._sending
            self._sending = 0
            self._broken = True
            self._rows.clear()
        self._complain(f"was not done after {timeout_s:.3g} s and is left behind")
        return False

    def close(self) -> None:
        """End as a finished run, unless it has ended; wait for at most ``CLOSE_TIMEOUT_S``."""
        self.end("finished")
        if not self._broken:
            self.join(timeout_s=CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        try:
            tracker = self._open_run(_with_id(self._run, self._id_file))
            self._id_file.parent.mkdir(parents=True, exist_ok=True)
            self._id_file.write_text(tracker.run_id, encoding="utf-8")
        except BaseException as error:  # libraries end the thread with SystemExit, too
            with self._changed:
                self._broken = True
                self._lost += len(self._rows)
                self._rows.clear()
            self._complain(f"could not be opened: {_short(error)}", error)
            return
        logger.info("%s run %s of project %s", self.name, tracker.run_id, self._run.project)
        while (row := self._take()) is not None:
            self._send(tracker, *row)
        try:
            tracker.finish(self._status or "finished")
        except BaseException as error:
            self._complain(f"could not end its run: {_short(error)}", error)

    def _take(self) -> tuple[int, dict[str, float], Histograms] | None:
        """Return the oldest row; None when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._status is not None)
            if not self._rows:
                return None
            self._sending = 1
            return self._rows.popleft()

    def _send(
        self, tracker: Tracker, step: int, values: dict[str, float], histograms: Histograms
    ) -> None:
        failure: BaseException | None = None
        try:
            tracker.log(step, metrics=values, histograms=histograms)
        except BaseException as error:
            failure = error
        with self._changed:
            self._lost += self._sending if failure is not None else 0
            self._sending = 0
        if failure is not None:
            self._complain(f"did not take step {step}: {_short(failure)}", failure)

    def _complain(self, what: str, error: BaseException | None = None) -> None:
        """Log the first failure; all are counted in ``lost_rows``."""
        with self._changed:
            if self._complained:
                return
            self._complained = True
        logger.warning("tracker %s %s; the run goes on", self.name, what)
        if error is not None:
            logger.info("where %s failed", self.name, exc_info=error)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown, named twice or not installed.

    Raises:
        ValueError: with what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(
                f"logging.trackers={list(names)}: {name!r} is unknown; known are "
                f"{', '.join(TRACKERS)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"logging.trackers={list(names)}: a tracker is named twice")
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"logging.trackers={list(names)}: {', '.join(missing)} cannot be imported; install "
            f"with pip install 'skyrl_async[{','.join(missing)}]', or take it out of the list"
        )


def start_trackers(
    names: Sequence[str], *, project: str, folder: Path, config: Mapping[str, Any]
) -> tuple[TrackerSink, ...]:
    """Return a sink for each tracker; their libraries load in their threads.

    Args:
        names: of the trackers.
        project: that the run belongs to.
        folder: of the run, whose name the run has at the trackers.
        config: nested values.

    Raises:
        ValueError: as :func:`check_trackers`.
    """
    check_trackers(names)
    run = TrackedRun(project=project, name=folder.name, folder=folder, config=config)
    return tuple(TrackerSink(name, run=run, open_run=_opener(name)) for name in names)


def end_trackers(
    sinks: Sequence[TrackerSink], *, status: Status, timeout_s: float
) -> dict[str, int]:
    """End all at the same time, and wait together for at most ``timeout_s``.

    Returns:
        Tracker -> steps that it did not take; without those that took all.
    """
    deadline_s = time.monotonic() + timeout_s
    for sink in sinks:
        sink.end(status)
    for sink in sinks:
        sink.join(timeout_s=deadline_s - time.monotonic())
    return {sink.name: sink.lost_rows for sink in sinks if sink.lost_rows}


def left_behind() -> bool:
    """Return whether a tracker of this process has not ended, though its run may have."""
    return any(thread.name.startswith(_THREAD_PREFIX) for thread in threading.enumerate())


def bins(counts: Mapping[int, int]) -> tuple[list[int], list[float]] | None:
    """Return a histogram of integers as counts per bin and the edges between bins.

    Every integer from the smallest to the largest has a bin of width 1 around it.

    Returns:
        Counts ``[N]`` and edges ``[N + 1]``; None if there is nothing, or more than 500 bins.
    """
    if not counts or max(counts) - min(counts) >= _MAX_BINS:
        return None
    numbers = range(min(counts), max(counts) + 1)
    edges = [number - 0.5 for number in (*numbers, max(counts) + 1)]
    return [counts.get(number, 0) for number in numbers], edges


def _opener(name: str) -> Callable[[TrackedRun], Tracker]:
    def open_run(run: TrackedRun) -> Tracker:
        tracker: Tracker = import_module(f"skyrl_async.metrics.trackers_{name}").open_run(run)
        return tracker

    return open_run


def _with_id(run: TrackedRun, file: Path) -> TrackedRun:
    """Return the run with the id that an earlier process has left, if any."""
    if not file.is_file():
        return run
    return replace(run, run_id=file.read_text(encoding="utf-8").strip() or None)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
