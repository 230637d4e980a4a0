"""Timeline events of one process, written to a file while it works.

Recording an event stores a tuple; a thread encodes and writes what was stored, twice a second. So a
killed process loses at most the last second, and the disk never holds up the work.

``<folder>/<process>.jsonl`` is one section for each process that wrote it, a resumed run appends
one. A section is a header object followed by arrays, times in microseconds since the header's:

=============================================  =================================================
``{"trace": 1, "process", "clock", "wall_s"``  header: who, and one moment on both clocks; times of
``"monotonic_s", ...}``                        processes with the same ``clock`` can be compared
``["L", lane, role, name, parts]``             a new lane
``["X", lane, name, start, duration, args?]``  a span
``["I", lane, name, time, args?]``             an instant
``["F", lane, stage, time, version, engine]``  where a policy version passed
``["C", lane, start, [part, duration, value,   spans back to back, each with its part of the lane
...]]``                                        and a number
``["D", time]``                                events before it are missing: they came too fast
=============================================  =================================================
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

FOLDER = "trace"
"""Of a run, for the files."""

FlowStage = Literal["made", "sent", "loaded"]
"""A policy version is made by the learner, sent to each engine, and loaded there."""

Args = Mapping[str, int | float | str]

_FLUSH_INTERVAL_S = 0.5
_MAX_PENDING = 200_000
"""About 40 MB; more come only if the disk does not answer."""
_MAX_BYTES = 256 << 20
_JOIN_TIMEOUT_S = 1.0
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Lane(Protocol):
    """One row of the timeline; all times are ``time.monotonic()``, in seconds."""

    def span(self, name: str, start_s: float, end_s: float, args: Args | None = None) -> None:
        """Record what went on from ``start_s`` to ``end_s``; spans may contain others."""
        ...

    def instant(self, name: str, time_s: float, args: Args | None = None) -> None:
        """Record a moment."""
        ...

    def flow(
        self, stage: FlowStage, *, policy_version: int, time_s: float, engine: str = ""
    ) -> None:
        """Record that a policy version passed here, within a span of this lane.

        Args:
            stage: of its way.
            policy_version: that passed.
            time_s: inside the span that the arrow begins or ends at.
            engine: that it is on its way to; ``""`` for all of them.
        """
        ...

    def chain(self, start_s: float, ends: Sequence[float]) -> None:
        """Record spans back to back as one event, much cheaper than one each.

        Args:
            start_s: of the first.
            ends: ``[part, end_s, value, part, end_s, value, ...]``, ``part`` an index into the
                lane's parts; the sequence must not change afterwards.
        """
        ...


class Tracing(Protocol):
    """Events of one process; see :func:`open_tracer`."""

    def lane(self, *, role: str, name: str, parts: Sequence[str] = ()) -> Lane:
        """Return a new row.

        Args:
            role: that its time is counted for, such as ``engine``.
            name: shown; unique within the process.
            parts: names for :meth:`Lane.chain`.
        """
        ...

    def close(self) -> None:
        """Write what is left; later events are lost. May be called twice."""
        ...


class NullLane:
    """A :class:`Lane` that records nothing."""

    __slots__ = ()

    def span(self, name: str, start_s: float, end_s: float, args: Args | None = None) -> None:
        """Do nothing."""

    def instant(self, name: str, time_s: float, args: Args | None = None) -> None:
        """Do nothing."""

    def flow(
        self, stage: FlowStage, *, policy_version: int, time_s: float, engine: str = ""
    ) -> None:
        """Do nothing."""

    def chain(self, start_s: float, ends: Sequence[float]) -> None:
        """Do nothing."""


NULL_LANE = NullLane()


class NullTracer:
    """A :class:`Tracing` that records nothing."""

    __slots__ = ()

    def lane(self, *, role: str, name: str, parts: Sequence[str] = ()) -> Lane:
        """Return a lane that records nothing."""
        return NULL_LANE

    def close(self) -> None:
        """Do nothing."""


NULL_TRACER = NullTracer()


def open_tracer(run_folder: Path | None, *, process: str) -> Tracing:
    """Return a tracer that writes to ``<run_folder>/trace/<process>.jsonl``.

    A timeline is not worth a failed run: where the file cannot be written, that is logged, and
    nothing is recorded.

    Args:
        run_folder: of the run; None records nothing.
        process: name of the process in the run, such as ``learner 0``.
    """
    if run_folder is None:
        return NULL_TRACER
    try:
        return Tracer(run_folder / FOLDER, process=process)
    except OSError as error:
        logger.warning("%s leaves no timeline: %s", process, error)
        return NULL_TRACER


class Tracer:
    """Writes the events of this process; all methods may be called from any thread.

    ::

        tracer = Tracer(run_folder / "trace", process="learner 0")
        lane = tracer.lane(role="learner", name="learner 0")
        lane.span("train", started_s, time.monotonic(), {"policy_version": 7})
        tracer.close()

    Args:
        folder: for the file; made if need be.
        process: name of this process in the run.
        flush_interval_s: between two writes.
        max_pending: events kept in memory; of more, the oldest are lost.
        max_bytes: of the file; at that size the recording ends.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: str,
        flush_interval_s: float = _FLUSH_INTERVAL_S,
        max_pending: int = _MAX_PENDING,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        if flush_interval_s <= 0 or max_pending < 1 or max_bytes < 1:
            raise ValueError(
                f"flush_interval_s={flush_interval_s}, max_pending={max_pending} and "
                f"max_bytes={max_bytes} must be > 0"
            )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub('[^A-Za-z0-9.-]+', '_', process)}.jsonl"
        self._process = process
        self._flush_interval_s = flush_interval_s
        self._max_bytes = max_bytes
        self._pending: deque[tuple[Any, ...]] = deque(maxlen=max_pending)
        self._start_s = time.monotonic()
        self._names: dict[str, str] = {}
        self._num_lanes = 0
        self._lanes_lock = threading.Lock()
        self._file_lock = threading.Lock()
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._write_header()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def lane(self, *, role: str, name: str, parts: Sequence[str] = ()) -> Lane:
        """Return a new row; see :meth:`Tracing.lane`."""
        with self._lanes_lock:
            number = self._num_lanes
            self._num_lanes += 1
        self._pending.append(("L", number, role, name, tuple(parts)))
        return _FileLane(number, self._pending)

    def flush(self) -> None:
        """Write what was recorded so far; a failure is logged and ends the recording."""
        with self._file_lock:
            if self._file is None:
                self._pending.clear()
                return
            try:
                self._write_pending(self._file)
                if os.fstat(self._file).st_size >= self._max_bytes:
                    raise ValueError(f"its file has reached {self._max_bytes} bytes")
            except (OSError, ValueError, TypeError) as error:
                logger.warning("the timeline of %s ends here: %s", self._process, error)
                self._shut()

    def close(self) -> None:
        """Write what is left; later events are lost. May be called twice."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self.flush()
            with self._file_lock:
                self._shut()

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _run(self) -> None:
        while not self._stopping.wait(self._flush_interval_s):
            self.flush()

    def _write_header(self) -> None:
        assert self._file is not None, "it was just opened"
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        header = {
            "trace": 1,
            "process": self._process,
            "pid": os.getpid(),
            "clock": _clock_name(),
            "wall_s": time.time(),
            "monotonic_s": self._start_s,
        }
        _write(self._file, ("\n" if torn else "") + _encode(header) + "\n")

    def _write_pending(self, file: int) -> None:
        pending, lines = self._pending, []
        if len(pending) == pending.maxlen:
            lines.append(f'["D",{self._micros(time.monotonic())}]')
        for _ in range(len(pending)):
            lines.append(self._line(pending.popleft()))
        if lines:
            lines.append("")
            _write(file, "\n".join(lines))

    def _line(self, event: tuple[Any, ...]) -> str:
        kind = event[0]
        if kind == "X":
            _, lane, name, start_s, end_s, args = event
            start = self._micros(start_s)
            head = f'["X",{lane},{self._name(name)},{start},{self._micros(end_s) - start}'
            return f"{head},{self._args(args)}]" if args else f"{head}]"
        if kind == "C":
            _, lane, start_s, ends = event
            return f'["C",{lane},{self._micros(start_s)},{self._chain(start_s, ends)}]'
        if kind == "I":
            _, lane, name, time_s, args = event
            head = f'["I",{lane},{self._name(name)},{self._micros(time_s)}'
            return f"{head},{self._args(args)}]" if args else f"{head}]"
        if kind == "F":
            _, lane, stage, time_s, version, engine = event
            return _encode(["F", lane, stage, self._micros(time_s), version, engine])
        return _encode(event)

    def _chain(self, start_s: float, ends: Sequence[float]) -> str:
        last = self._micros(start_s)
        flat: list[int] = []
        for index in range(0, len(ends), 3):
            end = self._micros(ends[index + 1])
            flat += (int(ends[index]), end - last, int(ends[index + 2]))
            last = end
        return str(flat).replace(" ", "")

    def _args(self, args: Args) -> str:
        # Nearly all are integers, for which this is a third of the encoder's time.
        items = [
            f"{self._name(key)}:{value if type(value) is int else _encode(value)}"
            for key, value in args.items()
        ]
        return "{" + ",".join(items) + "}"

    def _name(self, name: str) -> str:
        encoded = self._names.get(name)
        if encoded is None:
            encoded = self._names[name] = _encode(name)
        return encoded

    def _micros(self, time_s: float) -> int:
        return round((time_s - self._start_s) * 1e6)


class _FileLane:
    """Stores events for the writer."""

    __slots__ = ("_append", "_number")

    def __init__(self, number: int, pending: deque[tuple[Any, ...]]) -> None:
        self._number = number
        self._append = pending.append

    def span(self, name: str, start_s: float, end_s: float, args: Args | None = None) -> None:
        self._append(("X", self._number, name, start_s, end_s, args))

    def instant(self, name: str, time_s: float, args: Args | None = None) -> None:
        self._append(("I", self._number, name, time_s, args))

    def flow(
        self, stage: FlowStage, *, policy_version: int, time_s: float, engine: str = ""
    ) -> None:
        self._append(("F", self._number, stage, time_s, policy_version, engine))

    def chain(self, start_s: float, ends: Sequence[float]) -> None:
        self._append(("C", self._number, start_s, ends))


def _write(file: int, text: str) -> None:
    """Write all of ``text``, in as many calls as it takes."""
    left = memoryview(text.encode())
    while left:
        left = left[os.write(file, left) :]


def _clock_name() -> str:
    """Return a name that processes share if, and only if, they share the monotonic clock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = str(os.getpid())
    return f"{socket.gethostname()}/{boot}"
