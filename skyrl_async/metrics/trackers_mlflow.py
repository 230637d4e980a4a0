"""MLflow as a tracker; needs ``mlflow-skinny``, and SQLAlchemy for a local database.

``MLFLOW_TRACKING_URI`` names the server or store. Without it the run is written to
``<run folder>/mlflow.db``; ``mlflow ui --backend-store-uri sqlite:///PATH`` shows it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skyrl_async.metrics.recorder import Histograms
from skyrl_async.metrics.trackers import Status, TrackedRun

_STATUSES: Mapping[Status, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_MAX_PARAMS, _MAX_VALUE = 100, 500
"""Of one request, and of one value in characters."""


class MlflowTracker:
    """One run at MLflow; see :class:`skyrl_async.metrics.trackers.Tracker`.

    MLflow has no histograms: of those only mean, 95th percentile and maximum are there, as metrics.
    """

    def __init__(self, client: Any, *, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    @property
    def run_id(self) -> str:
        """Name by which the run goes on later."""
        return self._run_id

    def log(self, step: int, *, metrics: Mapping[str, float], histograms: Histograms) -> None:
        """Send the metrics of one step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [
            Metric(name, value, now_ms, step) for name, value in metrics.items() if name != "step"
        ]
        self._client.log_batch(self._run_id, metrics=rows)

    def finish(self, status: Status) -> None:
        """Set how the run ended."""
        self._client.set_terminated(self._run_id, status=_STATUSES[status])


def open_run(run: TrackedRun) -> MlflowTracker:
    """Start the run, or go on with the one that ``run.run_id`` names.

    Raises:
        Exception: what the library raises, for example without a connection to its server.
    """
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    if run.run_id is not None:
        client.update_run(run.run_id, status="RUNNING")
        return MlflowTracker(client, run_id=run.run_id)
    started = client.create_run(_experiment(client, run.project), run_name=run.name)
    tracker = MlflowTracker(client, run_id=started.info.run_id)
    params = list(_params(run.config))
    for start in range(0, len(params), _MAX_PARAMS):
        client.log_batch(tracker.run_id, params=params[start : start + _MAX_PARAMS])
    return tracker


def _experiment(client: Any, name: str) -> str:
    """Return the id of the experiment; another process may make it at the same time."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except Exception:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _params(values: Mapping[str, Any], prefix: Sequence[str] = ()) -> Iterator[Any]:
    """Yield nested values by dotted path."""
    from mlflow.entities import Param

    for name, value in values.items():
        path = (*prefix, name)
        if isinstance(value, Mapping) and value:
            yield from _params(value, path)
        else:
            yield Param(".".join(path), str(value)[:_MAX_VALUE])
