import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.timeline.shares import lane_shares, own_seconds, role_shares
from tests.timeline.traces import lane, trace

STEP = lane(("wait", 0, 2), ("step", 2, 8), ("train", 3, 7), ("forward", 3, 5), role="learner")


def test_a_span_has_what_those_inside_of_it_leave():
    assert own_seconds(STEP.spans, start_s=0, end_s=10) == {
        "idle": 2,
        "wait": 2,
        "step": 2,
        "train": 2,
        "forward": 2,
    }


def test_a_window_cuts_spans_and_those_around_them():
    assert own_seconds(STEP.spans, start_s=4, end_s=6) == {
        "idle": 0,
        "step": 0,
        "train": 1,
        "forward": 1,
    }


def test_where_spans_cross_no_second_counts_twice():
    crossing = lane(("a", 0, 4), ("b", 3, 6))
    assert own_seconds(crossing.spans, start_s=0, end_s=6) == {"a": 4, "b": 2, "idle": 0}


def test_shares_of_a_role_are_those_of_its_lanes_together():
    shares = role_shares(
        trace(
            lane(("decode", 0, 4), name="a"),
            lane(("decode", 0, 1), ("swap", 1, 2), name="b"),
            STEP,
        ),
        end_s=4,
    )
    assert shares["engine"] == pytest.approx({"decode": 5 / 8, "swap": 1 / 8, "idle": 2 / 8})
    assert shares["learner"]["wait"] == 0.5


def test_the_coordinator_has_no_share():
    waiting = lane(("wait", 0, 4), process="coordinator", role="coordinator")
    assert list(role_shares(trace(waiting, STEP))) == ["learner"]


def test_an_empty_window_has_no_shares_and_a_negative_one_is_refused():
    assert lane_shares(STEP, start_s=3, end_s=3) == {}
    with pytest.raises(ValueError, match=r"the window 3\.\.2 s ends before it starts"):
        own_seconds(STEP.spans, start_s=3, end_s=2)


times = st.integers(0, 40)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), times, times), max_size=25),
    times,
    st.integers(1, 40),
)
def test_shares_add_up_to_one_whatever_the_spans_are(spans, start_s, length_s):
    made = lane(*((name, min(a, b), max(a, b)) for name, a, b in spans))
    window = {"start_s": start_s, "end_s": start_s + length_s}
    seconds = own_seconds(made.spans, **window)
    assert sum(seconds.values()) == length_s
    assert all(spent >= 0 for spent in seconds.values())
    assert sum(lane_shares(made, **window).values()) == pytest.approx(1)
