from __future__ import annotations

import pytest

from skyrl_async.coordination.admission import Admission, ReleasedSlot, Slot
from skyrl_async.types import DropReason

KB = 1000


def make_admission(*, engines: int = 1, **values) -> Admission:
    admission = Admission(
        **{
            "groups_per_step": 2,
            "max_staleness": 1,
            "largest_group_bytes": KB,
            "capacity_bytes": 100 * KB,
            **values,
        }
    )
    for engine in range(engines):
        admission.engine_joined(f"e{engine}", admission.live_version)
    return admission


def admit_all(admission: Admission) -> list[int]:
    ids = []
    while (slot := admission.try_admit()) is not None:
        ids.append(slot.group_id)
    return ids


def insert(admission: Admission, *group_ids: int, size_bytes: int = KB) -> None:
    for group_id in group_ids:
        admission.insert(group_id, size_bytes=size_bytes, min_policy_version=admission.live_version)


def test_slots_are_limited_and_numbered():
    assert admit_all(make_admission()) == [0, 1, 2, 3]
    assert admit_all(make_admission(max_staleness=0)) == [0, 1]
    assert len(admit_all(make_admission(max_staleness=4, max_times_sampled=3))) == 3
    assert len(admit_all(make_admission(max_times_sampled=8))) == 2


def test_slot_is_born_at_the_version_that_every_engine_has():
    admission = make_admission(engines=2)
    admission.engine_loaded("e0", 3)
    assert admission.try_admit() == Slot(0, 0)

    admission.engine_loaded("e1", 2)
    assert admission.try_admit() == Slot(1, 2)
    assert dict(admission.in_flight_versions) == {0: 1, 2: 1}

    admission.drop(0, DropReason.EPISODE_TIMEOUT)
    assert dict(admission.in_flight_versions) == {2: 1}


def test_inserting_and_sampling_free_no_slot():
    admission = make_admission()
    insert(admission, *admit_all(admission))

    assert admission.try_admit() is None
    assert admission.num_slots == 4


def test_dropped_group_frees_its_slot_once():
    admission = make_admission()
    ids = admit_all(admission)

    released = admission.drop(ids[0], DropReason.STEP_TIMEOUT)

    assert released == ReleasedSlot(Slot(0, 0), DropReason.STEP_TIMEOUT)
    assert admit_all(admission) == [4]
    with pytest.raises(RuntimeError, match="group 0 is neither in flight nor held"):
        admission.drop(ids[0], DropReason.STEP_TIMEOUT)


def test_used_group_keeps_its_slot_until_its_version_is_live():
    admission = make_admission(engines=2)
    insert(admission, *admit_all(admission))

    assert admission.release_when_live(0, 1) == ()
    assert admission.engine_loaded("e0", 1) == ()
    assert admission.engine_loaded("e1", 1) == (ReleasedSlot(Slot(0, 0), "live"),)
    assert admission.release_when_live(1, 1) == (ReleasedSlot(Slot(1, 0), "live"),)


def test_skipped_versions_release_too():
    """Newest-wins publishing: versions 1 and 2 are never sent."""
    admission = make_admission()
    insert(admission, *admit_all(admission))
    for group_id in (0, 1):
        admission.release_when_live(group_id, 1)
    admission.release_when_live(2, 2)
    admission.release_when_live(3, 4)

    released = admission.engine_loaded("e0", 3)

    assert [r.slot.group_id for r in released] == [0, 1, 2]
    assert admission.group_ids() == {3}


def test_leaving_engine_lets_live_version_rise():
    admission = make_admission(engines=2)
    insert(admission, *admit_all(admission))
    admission.release_when_live(0, 5)
    admission.engine_loaded("e0", 6)

    released = admission.engine_left("e1")

    assert admission.live_version == 6
    assert [r.slot.group_id for r in released] == [0]


def test_without_engines_live_version_stays_and_the_next_one_must_have_it():
    admission = make_admission(live_version=4)
    admission.engine_left("e0")
    assert admission.live_version == 4

    with pytest.raises(RuntimeError, match="it must load version 4 or newer before it joins"):
        admission.engine_joined("e1", 3)
    admission.engine_joined("e1", 9)
    assert admission.live_version == 9


def test_engine_versions_never_go_back():
    admission = make_admission()
    admission.engine_loaded("e0", 2)
    admission.engine_loaded("e0", 2)

    with pytest.raises(RuntimeError, match="went from version 2 back to 1"):
        admission.engine_loaded("e0", 1)


@pytest.mark.parametrize("call", ["engine_left", "engine_loaded"])
def test_unknown_engine_is_refused(call):
    arguments = ("ghost",) if call == "engine_left" else ("ghost", 1)
    with pytest.raises(RuntimeError, match="engine ghost is not in the pool"):
        getattr(make_admission(), call)(*arguments)


def test_engine_cannot_join_twice():
    with pytest.raises(RuntimeError, match="engine e0 is in the pool already"):
        make_admission().engine_joined("e0", 0)


def test_bytes_are_reserved_in_flight_and_freed_after_the_last_use():
    admission = make_admission(max_staleness=9, capacity_bytes=3 * KB)
    assert admit_all(admission) == [0, 1, 2]

    insert(admission, 0, size_bytes=100)
    assert admission.held_bytes == 100
    assert admission.try_admit() is None, "900 bytes are free, the largest group has 1000"

    insert(admission, 1, size_bytes=100)
    assert admission.try_admit() == Slot(3, 0)
    insert(admission, 2, size_bytes=KB)
    assert admission.try_admit() is None

    admission.release_when_live(2, 1)
    assert admission.num_slots == 4, "its slot waits for version 1, its bytes do not"
    assert admission.try_admit() == Slot(4, 0)


def test_byte_limit_lets_a_batch_through():
    """The tightest limit that is accepted never holds back with less than a batch under way."""
    admission = make_admission(groups_per_step=5, capacity_bytes=5 * KB + 1)

    assert len(admit_all(admission)) == 5


def test_group_limit_counts_in_flight_and_held():
    admission = make_admission(capacity_groups=3)
    assert admit_all(admission) == [0, 1, 2]
    insert(admission, 0)
    assert admission.try_admit() is None

    admission.release_when_live(0, 1)
    assert admission.try_admit() == Slot(3, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_bytes": 2 * KB}, "capacity_bytes=2000 must exceed 2000"),
        ({"capacity_groups": 1}, "capacity_groups=1 must be at least learner.groups_per_step=2"),
    ],
)
def test_limits_that_would_deadlock_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_admission(**values)


def test_group_larger_than_its_reservation_is_refused():
    admission = make_admission()
    admission.try_admit()

    with pytest.raises(RuntimeError, match="has 1001 bytes, more than the 1000"):
        insert(admission, 0, size_bytes=KB + 1)


def test_token_older_than_the_slot_is_refused():
    admission = make_admission(live_version=3)
    admission.try_admit()

    with pytest.raises(RuntimeError, match="token of version 2, but was admitted"):
        admission.insert(0, size_bytes=1, min_policy_version=2)


def test_group_cannot_be_inserted_twice():
    admission = make_admission()
    admission.try_admit()
    insert(admission, 0)

    with pytest.raises(RuntimeError, match="group 0 is not in flight"):
        insert(admission, 0)


def test_restored_groups_take_slots_and_ids_go_on():
    admission = make_admission(live_version=7)
    admission.restore(5, size_bytes=100, min_policy_version=6)
    admission.number_from(9)

    assert admission.held_bytes == 100
    assert admit_all(admission) == [9, 10, 11]
    with pytest.raises(RuntimeError, match="group 5 was admitted twice"):
        admission.restore(5, size_bytes=100, min_policy_version=6)
    with pytest.raises(RuntimeError, match="cannot number groups from 3"):
        admission.number_from(3)


def test_restored_groups_must_fit():
    admission = make_admission(capacity_bytes=2 * KB + 1)
    admission.restore(0, size_bytes=KB, min_policy_version=0)
    admission.restore(1, size_bytes=KB, min_policy_version=0)

    with pytest.raises(ValueError, match="checkpoint's groups do not fit"):
        admission.restore(2, size_bytes=KB, min_policy_version=0)
