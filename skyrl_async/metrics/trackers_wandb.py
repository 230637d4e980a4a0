"""Weights & Biases as a tracker; needs the library ``wandb``.

Without an API key, and with ``WANDB_MODE=offline``, the run is written to ``<run folder>/wandb``;
``wandb sync FOLDER`` uploads it later.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from skyrl_async.metrics.recorder import Histograms
from skyrl_async.metrics.trackers import Status, TrackedRun, bins

_EXIT_CODES: Mapping[Status, int] = {"finished": 0, "failed": 1, "interrupted": 130}


class WandbTracker:
    """One run at Weights & Biases; see :class:`skyrl_async.metrics.trackers.Tracker`.

    The charts' axis is the metric ``step``: a run that goes on from a checkpoint repeats steps,
    which the library's own counter would refuse.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """Name by which the run goes on later."""
        return str(self._run.id)

    def log(self, step: int, *, metrics: Mapping[str, float], histograms: Histograms) -> None:
        """Hand the metrics of one step to the library's own process."""
        import wandb

        row: dict[str, Any] = {**metrics, "step": step}
        for name, counts in histograms.items():
            histogram = bins(counts)
            if histogram is not None:
                row[name] = wandb.Histogram(np_histogram=histogram)
        self._run.log(row)

    def finish(self, status: Status) -> None:
        """Upload what is left and end the run."""
        self._run.finish(exit_code=_EXIT_CODES[status])


def open_run(run: TrackedRun) -> WandbTracker:
    """Start the run, or go on with the one that ``run.run_id`` names.

    Raises:
        Exception: what the library raises, for example without a connection to its server.
    """
    import wandb

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    return WandbTracker(
        wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id or uuid.uuid4().hex[:8],
            dir=str(run.folder),
            config=dict(run.config),
            resume="allow" if run.run_id is not None else None,
            mode=_mode(),
            reinit="create_new",
            settings=settings,
        )
    )


def _mode() -> Any:
    """Return ``offline`` where nobody has logged in; None leaves the choice to the library."""
    import wandb

    if "WANDB_MODE" in os.environ or wandb.login(prompt=False):
        return None
    return "offline"
