"""Files that a run writes its metrics to: one JSON object per learner step, TensorBoard events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_async.metrics.names import charts
from skyrl_async.metrics.recorder import Histograms, Scalars

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


class JsonlSink:
    """Appends one strict JSON object per learner step; each line is in the file at once.

    Histograms are objects from number (as JSON requires, a string) to count.

    Args:
        path: file to write; folders above it are made.
        resume_step: continue the file of a run that goes on after this step: later lines, and a
            last one that was cut off, are removed. None starts a new file.

    Raises:
        ValueError: if the file exists and ``resume_step`` is None.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None and self.path.exists():
            raise ValueError(
                f"{self.path} exists; choose a new run.dir, or resume the run that wrote it"
            )
        if resume_step is not None and self.path.exists():
            _keep_until(self.path, step=resume_step)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Write one line.

        Raises:
            OSError: if the line cannot be written.
        """
        line = {"step": step, **metrics}
        line |= {name: dict(counts) for name, counts in histograms.items()}  # type: ignore[misc]
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_until(path: Path, *, step: int) -> None:
    """Rewrite a JSONL file with its whole lines up to ``step``, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with (
        path.open(encoding="utf-8", errors="replace") as old,
        partial.open("w", encoding="utf-8") as new,
    ):
        for line in old:
            # A crash of the machine can leave any bytes behind the last line that was synced.
            number = _step_of(line)
            if number is None or number > step:
                break
            new.write(line)
        new.flush()
        os.fsync(new.fileno())
    partial.replace(path)


def _step_of(line: str) -> int | None:
    """Return the step of a line, None if it was cut off."""
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class TensorBoardSink:
    """Writes TensorBoard events: scalars, integer histograms, and a layout for Custom Scalars.

    Neither torch nor tensorflow is imported: TensorBoard's own event writer would load tensorflow
    wherever it is installed, so the records go to a plain file. Events are in the file after every
    step. Values that were NaN or infinite leave a gap.

    Args:
        folder: where the event file goes; it is made.
        resume_step: events after this step, in other files of the folder, are no longer shown.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The name must contain "tfevents"; files of one run are read in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._writer = RecordWriter((self.folder / name).open("xb"))
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._put(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._put(Event(wall_time=time.time(), step=0, summary=_layout_summary()))
        self._writer.flush()

    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Write the metrics of one step.

        Raises:
            OSError: if the event cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if value is not None and name != "step"
        ]
        values += [_histogram(name, counts) for name, counts in histograms.items() if counts]
        self._put(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if not self._writer.closed:
            self._writer.close()

    def _put(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())


def _histogram(name: str, counts: Mapping[int, int]) -> Summary.Value:
    """Return counts of integers as a histogram whose buckets are centered on them."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    numbers = sorted(counts)
    limits: list[float] = []
    buckets: list[float] = []
    for number in numbers:
        if limits and limits[-1] < number - 0.5:
            limits.append(number - 0.5)
            buckets.append(0)
        limits.append(number + 0.5)
        buckets.append(counts[number])
    histogram = HistogramProto(
        min=numbers[0] - 0.5,
        max=numbers[-1] + 0.5,
        num=sum(buckets),
        sum=sum(number * counts[number] for number in numbers),
        sum_squares=sum(number**2 * counts[number] for number in numbers),
        bucket_limit=limits,
        bucket=buckets,
    )
    return Summary.Value(tag=name, histo=histogram)


def _layout_summary() -> Summary:
    """Return the sections and charts of the Custom Scalars page."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=section,
                chart=[
                    layout_pb2.Chart(
                        title=title, multiline=layout_pb2.MultilineChartContent(tag=patterns)
                    )
                    for title, patterns in charts_of_section.items()
                ],
            )
            for section, charts_of_section in charts().items()
        ]
    )
    return Summary(
        value=[
            Summary.Value(
                tag=metadata.CONFIG_SUMMARY_TAG,
                metadata=metadata.create_summary_metadata(),
                tensor=TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()]),
            )
        ]
    )
