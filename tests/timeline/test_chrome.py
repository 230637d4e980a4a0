import json

from skyrl_async.timeline.arrows import Stop, arrows
from skyrl_async.timeline.chrome import chrome_trace
from skyrl_async.timeline.reader import FlowPoint, read_trace
from tests.timeline.traces import lane, trace, write_small_run


def made(version, time_s):
    return FlowPoint("made", version, time_s, "")


def test_a_version_goes_from_the_learner_to_each_engine():
    found = arrows(
        trace(
            lane(flows=[made(1, 1.0), made(2, 2.0), made(3, 3.0)], process="learner 0"),
            lane(flows=[FlowPoint("sent", 1, 1.5, "e0"), FlowPoint("sent", 3, 3.5, "e0")]),
            lane(flows=[FlowPoint("sent", 1, 1.6, "e1")]),
            lane(flows=[FlowPoint("loaded", 1, 1.8, "")], process="e0"),
            lane(flows=[FlowPoint("loaded", 1, 1.4, "e1")], process="other"),
        )
    )
    # Version 2 was never sent, e1 loaded version 1 before it was sent to it, e0 not yet version 3.
    assert [(a.policy_version, a.engine, a.stops) for a in found] == [
        (1, "e0", (Stop(0, 1.0), Stop(1, 1.5), Stop(3, 1.8))),
        (1, "e1", (Stop(0, 1.0), Stop(2, 1.6))),
        (3, "e0", (Stop(0, 3.0), Stop(1, 3.5))),
    ]


def test_an_engine_that_came_back_gets_a_version_twice():
    found = arrows(
        trace(
            lane(flows=[made(1, 1.0)]),
            lane(flows=[FlowPoint("sent", 1, 1.5, "e0"), FlowPoint("sent", 1, 9.0, "e0")]),
            lane(
                flows=[FlowPoint("loaded", 1, 2.0, ""), FlowPoint("loaded", 1, 9.5, "")],
                process="e0",
            ),
        )
    )
    assert [[stop.time_s for stop in a.stops] for a in found] == [[1.0, 1.5, 2.0], [1.0, 9.0, 9.5]]


def test_the_trace_has_the_events_that_viewers_open(tmp_path):
    write_small_run(tmp_path)

    content = json.loads(json.dumps(chrome_trace(read_trace(tmp_path)), allow_nan=False))

    events = content["traceEvents"]
    by_phase: dict[str, list] = {}
    for event in events:
        by_phase.setdefault(event["ph"], []).append(event)
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in by_phase["M"]}
    assert names["process_name", 1, 0] == {"name": "learner 0"}
    assert names["thread_name", 2, 3] == {"name": "engine"}
    step = next(e for e in by_phase["X"] if e["name"] == "learner step")
    assert step == {
        **{"ph": "X", "name": "learner step", "ts": 1e6, "dur": 2e6, "cat": "learner"},
        **{"pid": 1, "tid": 1, "args": {"policy_version": 1}},
    }
    assert len(by_phase["X"]) == 8

    start, transfer, load = (by_phase[phase][0] for phase in "stf")
    assert len({e["id"] for e in (start, transfer, load)}) == 1
    assert [(e["pid"], e["tid"], e["ts"]) for e in (start, transfer, load)] == [
        (1, 1, 3_000_000),
        (1, 2, 3_000_000),
        (2, 3, 3_500_000),
    ]
    assert load["bp"] == "e" and "bp" not in start
