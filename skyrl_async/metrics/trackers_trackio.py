"""Trackio as a tracker; needs the library ``trackio``.

Runs go to its local database (``TRACKIO_DIR``), to a self-hosted server (``TRACKIO_SERVER_URL``) or
to a Space (``TRACKIO_SPACE_ID``); ``trackio show`` shows the local ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_async.metrics.recorder import Histograms
from skyrl_async.metrics.trackers import Status, TrackedRun, bins


class TrackioTracker:
    """One run at Trackio; see :class:`skyrl_async.metrics.trackers.Tracker`."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        """Name by which the run goes on later."""
        return str(self._run.name)

    def log(self, step: int, *, metrics: Mapping[str, float], histograms: Histograms) -> None:
        """Hand the metrics of one step to the library's thread."""
        import trackio

        row: dict[str, Any] = {name: value for name, value in metrics.items() if name != "step"}
        for name, counts in histograms.items():
            histogram = bins(counts)
            if histogram is not None:
                row[name] = trackio.Histogram(np_histogram=histogram)
        self._run.log(row, step=step)

    def finish(self, status: Status) -> None:
        """Write what is left and end the run."""
        self._run.finish()


def open_run(run: TrackedRun) -> TrackioTracker:
    """Start the run, or go on with the one that ``run.run_id`` names.

    Raises:
        Exception: what the library raises, for example without a connection to its server.
    """
    import trackio

    return TrackioTracker(
        trackio.init(
            project=run.project,
            name=run.run_id or run.name,
            config=dict(run.config),
            resume="allow" if run.run_id is not None else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    )
