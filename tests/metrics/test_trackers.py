import logging
import threading
import time

import pytest

from skyrl_async.metrics.recorder import Recorder
from skyrl_async.metrics.trackers import (
    TrackedRun,
    TrackerSink,
    bins,
    check_trackers,
    end_trackers,
    left_behind,
)

WAIT_S = 10.0


class ListTracker:
    """A tracker that keeps what it gets, and can be held up or fail."""

    def __init__(self, run_id="id1"):
        self.run_id = run_id
        self.rows = []
        self.status = None
        self.free = threading.Event()
        self.free.set()
        self.bad_steps = set()
        self.reached = threading.Semaphore(0)

    def log(self, step, *, metrics, histograms):
        self.reached.release()
        assert self.free.wait(WAIT_S)
        if step in self.bad_steps:
            raise ConnectionError(f"no route for {step}\nsecond line")
        self.rows.append((step, dict(metrics), dict(histograms)))

    def finish(self, status):
        self.status = status


@pytest.fixture
def tracker():
    tracker = ListTracker()
    yield tracker
    tracker.free.set()


def run_in(folder):
    return TrackedRun(project="p", name="r", folder=folder, config={"seed": 1})


def sink_of(tracker, folder, **options):
    return TrackerSink("wandb", run=run_in(folder), open_run=lambda run: tracker, **options)


def write(sink, *steps):
    for step in steps:
        sink.write(step, metrics={"a": step}, histograms={})


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_rows_arrive_in_order_without_values_that_were_not_finite(tracker, tmp_path):
    sink = sink_of(tracker, tmp_path)
    sink.write(1, metrics={"a": 0.5, "b": None}, histograms={"h": {2: 3}})
    sink.write(2, metrics={"a": 0.6}, histograms={})
    assert end_trackers([sink], status="failed", timeout_s=WAIT_S) == {}
    assert tracker.rows == [(1, {"a": 0.5}, {"h": {2: 3}}), (2, {"a": 0.6}, {})]
    assert tracker.status == "failed"


def test_a_slow_tracker_does_not_hold_up_the_run_and_loses_what_does_not_fit(
    tracker, tmp_path, caplog
):
    tracker.free.clear()
    sink = sink_of(tracker, tmp_path, max_waiting=3)
    write(sink, 1)
    assert tracker.reached.acquire(timeout=WAIT_S)
    started = time.monotonic()
    write(sink, *range(2, 12))
    assert time.monotonic() - started < 1
    assert sink.lost_rows == 7
    tracker.free.set()
    assert end_trackers([sink], status="finished", timeout_s=WAIT_S) == {"wandb": 7}
    assert [row[0] for row in tracker.rows] == [1, 2, 3, 4]
    assert warnings_of(caplog) == [
        "tracker wandb has 3 steps waiting; newer ones are lost; the run goes on"
    ]


def test_a_tracker_that_hangs_is_left_behind_and_its_steps_counted(tracker, tmp_path, caplog):
    tracker.free.clear()
    sink = sink_of(tracker, tmp_path)
    write(sink, 1, 2, 3)
    assert tracker.reached.acquire(timeout=WAIT_S)
    started = time.monotonic()
    assert end_trackers([sink], status="finished", timeout_s=0.2) == {"wandb": 3}
    sink.close()  # as the recorder does afterwards
    assert time.monotonic() - started < 2
    assert "left behind" in warnings_of(caplog)[0]
    write(sink, 4)
    assert sink.lost_rows == 4
    assert left_behind()
    tracker.free.set()
    assert sink.join(timeout_s=WAIT_S)
    assert not left_behind()


def test_failures_are_logged_once_and_counted_and_later_steps_go_on(tracker, tmp_path, caplog):
    tracker.bad_steps = {1, 3}
    sink = sink_of(tracker, tmp_path)
    write(sink, 1, 2, 3, 4)
    assert end_trackers([sink], status="finished", timeout_s=WAIT_S) == {"wandb": 2}
    assert [row[0] for row in tracker.rows] == [2, 4]
    assert warnings_of(caplog) == [
        "tracker wandb did not take step 1: ConnectionError: no route for 1; the run goes on"
    ]


@pytest.mark.parametrize("error", [OSError("no server"), SystemExit(3)])
def test_a_tracker_that_cannot_be_opened_costs_its_rows_only(tmp_path, caplog, error):
    may_fail = threading.Event()

    def open_run(run):
        assert may_fail.wait(WAIT_S)
        raise error

    sink = TrackerSink("mlflow", run=run_in(tmp_path), open_run=open_run)
    write(sink, 1, 2)
    may_fail.set()
    assert end_trackers([sink], status="finished", timeout_s=WAIT_S) == {"mlflow": 2}
    write(sink, 3)
    assert sink.lost_rows == 3
    assert "could not be opened" in warnings_of(caplog)[0]
    assert not list(tmp_path.rglob("*.id"))


def test_trackers_end_together_within_one_deadline(tmp_path):
    trackers = [ListTracker(), ListTracker(), ListTracker()]
    sinks = [sink_of(t, tmp_path / str(i)) for i, t in enumerate(trackers)]
    for tracker, sink in zip(trackers, sinks, strict=True):
        tracker.free.clear()
        write(sink, 1)
    started = time.monotonic()
    end_trackers(sinks, status="interrupted", timeout_s=0.3)
    assert time.monotonic() - started < 0.8
    for tracker in trackers:
        tracker.free.set()


def test_a_run_that_goes_on_is_the_same_run_at_the_tracker(tmp_path):
    seen = []

    def open_run(run):
        seen.append(run.run_id)
        return ListTracker("run-77")

    for _ in range(2):
        sink = TrackerSink("trackio", run=run_in(tmp_path), open_run=open_run)
        end_trackers([sink], status="finished", timeout_s=WAIT_S)
    assert seen == [None, "run-77"]


def test_it_is_a_sink_of_the_recorder(tracker, tmp_path):
    sink = sink_of(tracker, tmp_path)
    recorder = Recorder([sink])
    recorder.record("reward/mean", 0.5)
    recorder.flush(1)
    recorder.close()
    assert tracker.rows[0][0] == 1
    assert tracker.rows[0][1]["reward/mean"] == 0.5
    assert tracker.status == "finished"


def test_bins_are_one_integer_wide():
    assert bins({3: 5, 1: 2}) == ([2, 0, 5], [0.5, 1.5, 2.5, 3.5])
    assert bins({}) is None
    assert bins({0: 1, 500: 1}) is None
    assert bins({0: 1, 499: 1}) is not None


def test_unknown_and_repeated_trackers_are_refused():
    check_trackers(())
    with pytest.raises(ValueError, match=r"'wanb' is unknown; known are wandb, mlflow, trackio"):
        check_trackers(("wanb",))
    with pytest.raises(ValueError, match="named twice"):
        check_trackers(("mlflow", "mlflow"))


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(
        "skyrl_async.metrics.trackers.find_spec", lambda name: None if name != "mlflow" else object
    )
    with pytest.raises(ValueError, match=r"pip install 'skyrl_async\[wandb,trackio\]'"):
        check_trackers(("wandb", "mlflow", "trackio"))
