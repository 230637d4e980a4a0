import pytest

from skyrl_async.timeline.reader import Span, read_trace
from tests.timeline.traces import write, write_small_run

LANE = ["L", 0, "engine", "n", []]


def test_a_run_without_a_timeline_has_no_lanes(tmp_path):
    trace = read_trace(tmp_path)
    assert (trace.lanes, trace.end_s) == ((), 0.0)


def test_processes_of_one_machine_are_merged_by_the_clock_that_nobody_sets(tmp_path):
    # Between the two starts the wall clock was set back by 100 s.
    write(tmp_path, "a", LANE, ["X", 0, "x", 0, 1_000_000], wall_s=1000.0, monotonic_s=10.0)
    write(tmp_path, "b", LANE, ["X", 0, "y", 0, 1_000_000], wall_s=902.0, monotonic_s=12.0)

    trace = read_trace(tmp_path)

    starts = {span.name: span.start_s for lane in trace.lanes for span in lane.spans}
    assert starts == {"x": 0.0, "y": 2.0}
    assert (trace.start_wall_s, trace.end_s) == (1000.0, 3.0)


def test_the_coordinator_comes_first_and_the_others_by_number(tmp_path):
    for process in ("engine 0", "learner 10", "coordinator", "learner 2"):
        write(tmp_path, process, LANE, ["X", 0, "x", 0, 1_000_000])
    lanes = read_trace(tmp_path).lanes
    assert [lane.process for lane in lanes] == [
        "coordinator",
        "engine 0",
        "learner 2",
        "learner 10",
    ]


def test_machines_are_merged_by_their_wall_clocks(tmp_path):
    write(tmp_path, "a", LANE, ["X", 0, "x", 0, 1_000_000], wall_s=1000.0, monotonic_s=10.0)
    write(
        *(tmp_path, "b", LANE, ["X", 0, "y", 500_000, 1_000_000]),
        **{"wall_s": 1003.0, "monotonic_s": 777.0, "clock": "other"},
    )

    trace = read_trace(tmp_path)

    starts = {span.name: span.start_s for lane in trace.lanes for span in lane.spans}
    assert starts == {"x": 0.0, "y": 3.5}


def test_lines_of_another_form_are_left_out(tmp_path):
    write(
        tmp_path,
        "a",
        *(LANE, ["X", 7, "of no lane", 0, 1], ["X", 0], ["?", 0, 1], [], "text", 17, {"a": 1}),
        *(["X", 0, "no number", "1", 2], ["C", 0, 0, [5, 1, 1]], ["F", 0, "made"]),
        ["X", 0, "whole", 5, 1_000_000],
    )
    with open(tmp_path / "trace" / "a.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n["X",0,"torn')

    (lane,) = read_trace(tmp_path).lanes
    assert lane.spans == (Span("whole", pytest.approx(5e-6), pytest.approx(1.000005), {}),)


def test_events_before_the_first_header_are_left_out(tmp_path):
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "a.jsonl").write_text('["X",0,"x",0,1]\n{"trace":1,"process":"a"}\n')
    assert read_trace(tmp_path).lanes == ()


def test_spans_that_touch_in_the_file_touch_exactly(tmp_path):
    events = [["X", 0, "x", 333_333 * i + 7, 333_333] for i in range(50)]
    write(tmp_path, "a", LANE, *events, monotonic_s=0.1)
    write(tmp_path, "b", LANE, *events, monotonic_s=0.7)
    for lane in read_trace(tmp_path).lanes:
        ends = [span.end_s for span in lane.spans][:-1]
        assert ends == [span.start_s for span in lane.spans][1:]


def test_lost_events_and_the_names_of_everything(tmp_path):
    write_small_run(tmp_path)
    write(tmp_path, "rollout actor 0", ["D", 2_000_000], monotonic_s=20.0)

    trace = read_trace(tmp_path)

    assert [(lane.process, lane.role, lane.name) for lane in trace.lanes] == [
        ("learner 0", "learner", "rank 0"),
        ("learner 0", "publisher", "transfer to rollout actor 0"),
        ("rollout actor 0", "engine", "engine"),
        ("rollout actor 0", "slot", "slot 0"),
    ]
    assert trace.gaps == (("rollout actor 0", 12.0),)
    assert trace.sections == (0.0, 0.0, 10.0)
    slot = trace.lanes[3]
    assert [(s.name, s.start_s, s.end_s, s.args) for s in slot.spans] == [
        ("generate", 0.0, 1.0, {"tokens": 12}),
        ("environment", 1.0, 1.5, {}),
    ]
