import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.metrics.trace import Tracer
from skyrl_async.rollout.slots import NULL_SLOT, PARTS, Slots
from skyrl_async.timeline.reader import read_trace
from tests.fakes import FakeClock


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    return {part: spent for part, spent in seconds.items() if spent}


def test_each_second_of_a_slot_is_of_one_part():
    clock = FakeClock()
    slots = Slots(clock=clock)
    slot = slots.open()
    clock.now += 1
    slot.in_environment()
    clock.now += 2
    slot.works()
    clock.now += 4
    slot.generates()
    clock.now += 8
    slot.generated(3, queued_s=5)
    clock.now += 16
    slot.ends()
    clock.now += 32
    slot.close()
    clock.now += 64

    assert slots.take() == {
        "other": 1 + 4,
        "environment": 2 + 16,
        "generate": 3,
        "wait_engine": 5,
        "wait_group": 32,
        "wait_admission": 64,
    }


def test_a_slot_that_was_freed_is_used_again_and_one_more_is_another_slot():
    clock = FakeClock()
    slots = Slots(clock=clock)
    first, second = slots.open(), slots.open()
    clock.now += 1
    second.close()
    clock.now += 1
    third = slots.open()  # in the place of the second
    clock.now += 1
    assert nonzero(slots.take()) == {"other": 3 + 1 + 1, "wait_admission": 1}
    first.close()
    third.close()
    clock.now += 1
    assert nonzero(slots.take()) == {"wait_admission": 2}


def test_a_queue_that_is_known_late_is_taken_from_generation_of_later_intervals():
    clock = FakeClock()
    slots = Slots(clock=clock)
    slot = slots.open()
    slot.generates()
    clock.now += 10
    assert nonzero(slots.take()) == {"generate": 10}
    clock.now += 1
    slot.generated(1, queued_s=4)
    assert nonzero(slots.take()) == {"wait_engine": 1}
    slot.generates()
    clock.now += 5
    assert nonzero(slots.take()) == {"wait_engine": 3, "generate": 2}


CALLS = ("open", "works", "in_environment", "generates", "generated", "ends", "close", "take")


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 5), st.floats(0, 3)), max_size=60))
def test_parts_of_all_slots_add_up_to_their_wall_time(calls):
    clock = FakeClock()
    slots = Slots(clock=clock)
    opened: list = []
    num_slots, expected, taken = 0, 0.0, 0.0
    for call, which, passed_s in calls:
        if call == "open":
            opened.append(slots.open())
            num_slots = max(num_slots, len(opened))
        elif call == "take":
            seconds = slots.take()
            assert min(seconds.values()) >= 0
            taken += sum(seconds.values())
        elif opened:
            slot = opened[which % len(opened)]
            if call == "generated":
                slot.generates()
                clock.now += 1.0
                expected += num_slots
                slot.generated(2, queued_s=0.5)
            else:
                getattr(slot, call)()
            if call == "close":
                opened.remove(slot)
        clock.now += passed_s
        expected += num_slots * passed_s
    seconds = slots.take()
    assert seconds.keys() == set(PARTS)
    assert taken + sum(seconds.values()) == pytest.approx(expected, abs=1e-6)


def test_the_first_slots_are_drawn(tmp_path):
    tracer = Tracer(tmp_path / "trace", process="rollout actor 0")
    slots = Slots(tracer=tracer, num_drawn=1)
    drawn, counted = slots.open(), slots.open()
    for slot in (drawn, counted):
        slot.in_environment()
        slot.generates()
        time.sleep(0.03)
        slot.generated(7, queued_s=0.01)
        slot.ends()
        time.sleep(0.01)
        slot.close()
    tracer.close()

    (lane,) = read_trace(tmp_path).lanes
    assert (lane.role, lane.name) == ("slot", "slot 0")
    spans = {span.name: span for span in lane.spans}
    assert spans["wait_engine"].duration_s == pytest.approx(0.01, abs=1e-5)
    assert spans["wait_engine"].end_s == spans["generate"].start_s
    assert spans["generate"].args == {"tokens": 7} and spans["generate"].duration_s >= 0.02
    assert spans["wait_group"].duration_s >= 0.01


def test_the_clock_of_an_evaluation_counts_nothing():
    NULL_SLOT.works()
    NULL_SLOT.in_environment()
    NULL_SLOT.generates()
    NULL_SLOT.generated(1, queued_s=0.0)
