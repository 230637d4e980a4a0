import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.metrics.ledger import PartTotals, TimeLedger, fractions


class FakeClock:
    """Seconds that only go on when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def ledger(clock):
    return TimeLedger("learner", parts=("other", "wait_batch", "train"), clock=clock)


def test_parts_take_the_time_in_which_they_run(ledger, clock):
    clock.advance(1)
    with ledger.part("wait_batch"):
        clock.advance(2)
    ledger.switch_to("train")
    clock.advance(5)
    assert ledger.take() == {"other": 1, "wait_batch": 2, "train": 5}


def test_an_interval_that_ends_inside_a_part_is_split_there(ledger, clock):
    clock.advance(1)
    with ledger.part("wait_batch"):
        clock.advance(2)
        first = ledger.take()
        clock.advance(4)
    clock.advance(4)
    second = ledger.take()
    assert first == {"other": 1, "wait_batch": 2, "train": 0}
    assert second == {"other": 4, "wait_batch": 4, "train": 0}
    for taken in (first, second):
        assert sum(fractions(taken).values()) == pytest.approx(1)


def test_an_inner_part_is_not_counted_in_the_outer_one(ledger, clock):
    with ledger.part("train"):
        clock.advance(1)
        with ledger.part("wait_batch"):
            clock.advance(10)
        clock.advance(1)
    assert ledger.current == "other"
    assert ledger.take() == {"other": 0, "wait_batch": 10, "train": 2}


def test_a_part_ends_when_its_block_raises(ledger, clock):
    with pytest.raises(KeyError), ledger.part("train"):
        clock.advance(1)
        raise KeyError
    clock.advance(3)
    assert ledger.take() == {"other": 3, "wait_batch": 0, "train": 1}


_events = st.tuples(st.sampled_from(["other", "wait_batch", "train", "take"]), st.floats(0, 10))


@given(st.lists(_events, max_size=30))
def test_parts_add_up_to_the_wall_time_of_every_interval(events):
    clock = FakeClock()
    ledger = TimeLedger("learner", parts=("other", "wait_batch", "train"), clock=clock)
    interval_start = clock.now
    for event, seconds in [*events, ("take", 1.0)]:
        clock.advance(seconds)
        if event != "take":
            ledger.switch_to(event)
            continue
        taken = ledger.take()
        elapsed, interval_start = clock.now - interval_start, clock.now
        assert sum(taken.values()) == pytest.approx(elapsed, abs=1e-9)
        if elapsed > 0:
            assert sum(fractions(taken).values()) == pytest.approx(1)


def test_what_was_taken_is_plain_and_does_not_change(ledger, clock):
    clock.advance(1)
    taken = ledger.take()
    clock.advance(1)
    ledger.take()
    assert pickle.loads(pickle.dumps(taken)) == {"other": 1, "wait_batch": 0, "train": 0}
    assert type(taken) is dict


def test_an_unknown_part_is_named_with_the_known_ones(ledger):
    with pytest.raises(ValueError, match="'learner' has no part 'wait'; it has other, wait_batch"):
        ledger.switch_to("wait")


@pytest.mark.parametrize("parts", [(), ("a", "a")])
def test_parts_must_be_different_names(parts):
    with pytest.raises(ValueError, match="must be one or more different names"):
        TimeLedger("engine", parts=parts)


def test_no_time_has_no_fractions():
    assert fractions({"a": 0.0}) == {}


class ListLane:
    """Keeps spans as name, start and end."""

    def __init__(self):
        self.spans = []

    def span(self, name, start_s, end_s, args=None):
        self.spans.append((name, start_s, end_s))


def test_parts_and_details_are_spans_of_the_lane(clock):
    lane = ListLane()
    ledger = TimeLedger("learner", parts=("wait", "train", "step"), clock=clock, lane=lane)
    clock.advance(1)
    with ledger.part("train"):
        assert ledger.since_s == 101
        clock.advance(2)
        with ledger.detail("forward"):
            clock.advance(3)
        ledger.take()  # an interval may end anywhere without cutting the span
        with ledger.part("train"), ledger.part("step"):
            clock.advance(4)
    assert lane.spans == [
        ("wait", 100, 101),
        ("forward", 103, 106),
        ("train", 101, 106),
        ("step", 106, 110),
        ("train", 110, 110),
    ]
    assert ledger.take() == {"wait": 0, "train": 0, "step": 4}


def test_totals_count_from_the_first_step_to_the_last():
    totals = PartTotals()
    totals.add("learner", {"wait": 100, "train": 1})
    totals.end_step()
    assert totals.fractions() == {}
    totals.add("learner", {"wait": 1, "train": 2})
    totals.add("actor", {"generate": 3})
    totals.add("actor", {"generate": 0, "other": 1})
    totals.end_step()
    totals.add("learner", {"wait": 50})

    expected = {
        "learner": {"wait": 1 / 3, "train": 2 / 3},
        "actor": {"generate": 0.75, "other": 0.25},
    }
    assert totals.fractions() == expected

    later = PartTotals()
    later.restore(totals.state())
    assert later.fractions() == expected
    later.add("learner", {"wait": 3})
    later.end_step()
    assert later.fractions()["learner"] == {"wait": 4 / 6, "train": 2 / 6}
