"""The excerpt of the timeline: in the window, in order, small, with nothing invented."""

import time
from pathlib import Path

from benchmarks.synthetic_run import SECONDS_PER_STEP, write_run
from skyrl_async.metrics.trace import open_tracer
from skyrl_async.report.content import RunContent
from skyrl_async.report.history import History
from skyrl_async.report.timeline_excerpt import (
    LONGEST_WINDOW_S,
    MAX_LANES,
    STEPS_SHOWN,
    timeline_excerpt,
)


def history(*, step_s: float) -> History:
    made = History()
    made.extend([{"step": i, "time_s": i * step_s} for i in range(1, 11)])
    return made


def test_a_run_without_timeline_has_no_excerpt(tmp_path: Path):
    assert timeline_excerpt(tmp_path, history(step_s=1.0)) is None


def test_it_shows_a_few_steps_of_every_role(tmp_path: Path):
    write_run(tmp_path / "run", steps=60)
    excerpt = RunContent(tmp_path / "run").read()["timeline"]
    assert excerpt["seconds"] == STEPS_SHOWN * SECONDS_PER_STEP
    assert [lane["role"] for lane in excerpt["lanes"]] == ["learner", "engine", *["slot"] * 8]
    for lane in excerpt["lanes"]:
        for _, begin, end, *_ in lane["spans"]:
            assert 0 <= begin <= end <= excerpt["seconds"]
    names = [span[0] for span in excerpt["lanes"][0]["spans"]]
    assert names.count("train") in (STEPS_SHOWN, STEPS_SHOWN + 1)
    waits = {span[0]: span[4] for span in excerpt["lanes"][0]["spans"]}
    assert waits == {"wait": True, "train": False}
    made = {flow[0] for flow in excerpt["flows"] if flow[1] == "made"}
    assert len(made) == STEPS_SHOWN


def test_spans_inside_others_are_deeper_and_neighbors_are_not(tmp_path: Path):
    tracer = open_tracer(tmp_path, process="learner 0")
    lane = tracer.lane(role="learner", name="rank 0")
    start = time.monotonic()
    lane.span("train", start, start + 0.5)
    lane.span("forward", start, start + 0.25)
    lane.span("backward", start + 0.25, start + 0.5)
    lane.span("wait", start + 0.5, start + 1.0)
    tracer.close()
    excerpt = timeline_excerpt(tmp_path, history(step_s=1.0))
    depths = {span[0]: span[3] for span in excerpt["lanes"][0]["spans"]}
    assert depths == {"train": 0, "forward": 1, "backward": 1, "wait": 0}


def test_many_short_spans_become_few_and_no_time_is_lost(tmp_path: Path):
    tracer = open_tracer(tmp_path, process="actor")
    learner = tracer.lane(role="learner", name="rank 0")
    slots = [tracer.lane(role="slot", name=f"slot {i}") for i in range(10)]

    start = time.monotonic()
    learner.span("train", start, start + 1.0)
    for slot in slots:
        for i in range(4000):
            begin = start + i * 250e-6
            slot.span("generate", begin, begin + 250e-6)
    tracer.close()
    excerpt = timeline_excerpt(tmp_path, history(step_s=100.0))
    assert excerpt["seconds"] == LONGEST_WINDOW_S
    shown = [lane for lane in excerpt["lanes"] if lane["role"] == "slot"]
    assert len(shown) == MAX_LANES["slot"]
    assert excerpt["left_out"] == 10 - MAX_LANES["slot"]
    for lane in shown:
        assert len(lane["spans"]) <= 60
        assert sum(end - begin for _, begin, end, *_ in lane["spans"]) > 0.98
