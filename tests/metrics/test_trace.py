import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from skyrl_async.metrics.trace import NULL_LANE, NULL_TRACER, Tracer, open_tracer
from skyrl_async.timeline.reader import Trace, read_trace


def make_tracer(run: Path, process: str = "learner 0", **options) -> Tracer:
    return Tracer(run / "trace", process=process, flush_interval_s=60, **options)


def only_lane(trace: Trace):
    (lane,) = trace.lanes
    return lane


def test_what_is_recorded_is_read_with_seconds_since_the_start(tmp_path):
    tracer = make_tracer(tmp_path)
    lane = tracer.lane(role="learner", name="rank 0")
    start = time.monotonic()
    lane.span("train", start + 1, start + 3.5, {"policy_version": 7, "why": 'a "test"', "x": 0.5})
    lane.span("wait", start, start + 1)
    lane.instant("restart", start + 2, {"incarnation": 2})
    lane.flow("made", policy_version=7, time_s=start + 3, engine="engine 1")
    tracer.close()

    trace = read_trace(tmp_path)
    read = only_lane(trace)

    assert (read.process, read.role, read.name) == ("learner 0", "learner", "rank 0")
    wait, train = read.spans
    assert (wait.name, dict(wait.args)) == ("wait", {})
    assert (train.name, train.args) == ("train", {"policy_version": 7, "why": 'a "test"', "x": 0.5})
    assert train.duration_s == pytest.approx(2.5, abs=2e-6)
    assert train.start_s - wait.start_s == pytest.approx(1, abs=2e-6)
    assert 0 <= wait.start_s < 1
    (instant,), (flow,) = read.instants, read.flows
    assert (instant.name, instant.args) == ("restart", {"incarnation": 2})
    assert (flow.stage, flow.policy_version, flow.engine) == ("made", 7, "engine 1")
    assert flow.time_s - wait.start_s == pytest.approx(3, abs=2e-6)
    assert trace.end_s == train.end_s


def test_a_chain_is_spans_that_touch(tmp_path):
    tracer = make_tracer(tmp_path)
    lane = tracer.lane(role="slot", name="slot 0", parts=("generate", "environment"))
    start = time.monotonic()
    lane.chain(start, [1, start + 0.1, 0, 0, start + 0.4, 12, 1, start + 0.4, 0, 0, start + 0.6, 5])
    tracer.close()

    spans = only_lane(read_trace(tmp_path)).spans

    names = [(s.name, dict(s.args)) for s in spans]
    generate = [("generate", {"tokens": 12}), ("generate", {"tokens": 5})]
    assert names == [("environment", {}), *generate]  # the one that took no time is not there
    assert [s.duration_s for s in spans] == pytest.approx([0.1, 0.3, 0.2], abs=3e-6)
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(spans))


def test_a_resumed_run_goes_on_in_the_same_lanes_also_after_a_torn_line(tmp_path):
    for number in range(2):
        tracer = make_tracer(tmp_path)
        other = tracer.lane(role="publisher", name=f"only in {number}")
        lane = tracer.lane(role="learner", name="rank 0")
        now = time.monotonic()
        lane.span(f"train {number}", now, now + 0.5)
        other.span("transfer", now, now + 0.5)
        tracer.close()
        with open(tmp_path / "trace" / "learner_0.jsonl", "a") as file:
            file.write('["X",1,"torn",17')

    trace = read_trace(tmp_path)

    lanes = {lane.name: [span.name for span in lane.spans] for lane in trace.lanes}
    assert lanes == {
        "only in 0": ["transfer"],
        "only in 1": ["transfer"],
        "rank 0": ["train 0", "train 1"],
    }
    assert len(trace.sections) == 2 and trace.sections[0] == 0 < trace.sections[1]


def test_a_killed_process_leaves_all_but_its_last_second(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from skyrl_async.metrics.trace import open_tracer\n"
        "lane = open_tracer(Path(sys.argv[1]), process='p').lane(role='r', name='n')\n"
        "now = time.monotonic(); lane.span('before', now - 1, now); print(flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(1.0)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    child.stdout.close()

    assert [span.name for span in only_lane(read_trace(tmp_path)).spans] == ["before"]


def test_events_of_many_threads_are_all_there(tmp_path):
    tracer = make_tracer(tmp_path)

    def record(number: int) -> None:
        lane = tracer.lane(role="r", name=f"lane {number}")
        for index in range(500):
            now = time.monotonic()
            lane.span(f"{number}", now, now + 1e-3, {"index": index})
            if index % 100 == 0:
                tracer.flush()

    threads = [threading.Thread(target=record, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.close()

    trace = read_trace(tmp_path)
    assert len(trace.lanes) == 4
    for lane in trace.lanes:
        assert sorted(span.args["index"] for span in lane.spans) == list(range(500))


def test_memory_is_bounded_and_the_gap_is_told(tmp_path):
    tracer = make_tracer(tmp_path, max_pending=10)
    lane = tracer.lane(role="r", name="n")
    tracer.flush()
    now = time.monotonic()
    for index in range(25):
        lane.span("busy", now, now + 1, {"index": index})
    tracer.close()

    trace = read_trace(tmp_path)
    assert [s.args["index"] for s in only_lane(trace).spans] == list(range(15, 25))
    assert [process for process, _ in trace.gaps] == ["learner 0"]


def test_the_file_is_bounded(tmp_path, caplog):
    tracer = make_tracer(tmp_path, max_bytes=2000)
    lane = tracer.lane(role="r", name="n")
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            lane.span("busy", 0, 1)
            tracer.flush()
        tracer.close()
    size = (tmp_path / "trace" / "learner_0.jsonl").stat().st_size
    assert 2000 <= size < 2100
    assert "the timeline of learner 0 ends here" in caplog.text


def test_an_event_that_cannot_be_encoded_ends_the_timeline_and_not_the_run(tmp_path, caplog):
    tracer = make_tracer(tmp_path)
    lane = tracer.lane(role="r", name="n")
    lane.span("bad", 0, 1, {"nan": float("nan")})
    with caplog.at_level(logging.WARNING):
        tracer.flush()
    assert "ends here" in caplog.text
    lane.span("later", 0, 1)
    tracer.flush()
    tracer.close()
    tracer.close()
    assert "later" not in (tmp_path / "trace" / "learner_0.jsonl").read_text()


def test_where_no_file_can_be_made_nothing_is_recorded(tmp_path, caplog):
    (tmp_path / "trace").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tracer = open_tracer(tmp_path, process="learner 0")
    assert tracer is NULL_TRACER and "learner 0 leaves no timeline" in caplog.text


def test_without_a_folder_nothing_is_recorded(tmp_path):
    tracer = open_tracer(None, process="learner 0")
    lane = tracer.lane(role="r", name="n", parts=("a",))
    lane.span("x", 0, 1)
    lane.instant("x", 0)
    lane.flow("made", policy_version=1, time_s=0)
    lane.chain(0, [0, 1, 2])
    tracer.close()
    assert lane is NULL_LANE


@pytest.mark.parametrize("bad", [{"max_pending": 0}, {"max_bytes": 0}, {"flush_interval_s": 0}])
def test_limits_must_be_positive(tmp_path, bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}=0.* must be > 0"):
        Tracer(tmp_path, **{"process": "p", **bad})


def test_lines_are_json_and_the_first_is_the_header(tmp_path):
    tracer = make_tracer(tmp_path)
    tracer.lane(role="engine", name="engine").span("swap", 0, 1, {"policy_version": 1})
    tracer.close()
    lines = (tmp_path / "trace" / "learner_0.jsonl").read_text().splitlines()
    header, *events = map(json.loads, lines)
    assert header["trace"] == 1 and header["process"] == "learner 0"
    assert abs(header["wall_s"] - time.time()) < 60 and header["pid"] == os.getpid()
    assert [event[0] for event in events] == ["L", "X"]
