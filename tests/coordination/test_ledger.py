from __future__ import annotations

import pytest

from skyrl_async.coordination.admission import Admission, ReleasedSlot, Slot
from skyrl_async.coordination.ledger import GroupLedger, LedgerState
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import DroppedGroup, DropReason
from tests.coordination.groups import LARGEST_GROUP_BYTES, make_group


def make_ledger(
    *,
    rule: str = "mask",
    bound: int = 1,
    batch: int = 2,
    uses: int = 1,
    live_version: int = 0,
    state: LedgerState | None = None,
) -> GroupLedger:
    ledger = GroupLedger(
        admission=Admission(
            groups_per_step=batch,
            max_staleness=bound,
            max_times_sampled=uses,
            largest_group_bytes=LARGEST_GROUP_BYTES,
            capacity_bytes=100 * LARGEST_GROUP_BYTES,
            live_version=live_version,
        ),
        buffer=ReplayBuffer(
            groups_per_step=batch,
            max_times_sampled=uses,
            rule=StalenessRule(name=rule, max_staleness=bound, groups_per_step=batch),
        ),
        state=state,
    )
    ledger.engine_joined("e", live_version)
    return ledger


def admit_all(ledger: GroupLedger) -> list[int]:
    ids = []
    while (slot := ledger.try_admit()) is not None:
        ids.append(slot.group_id)
    return ids


def test_the_loop_of_one_run():
    ledger = make_ledger()
    assert admit_all(ledger) == [0, 1, 2, 3]
    for group_id in (0, 1, 2):
        ledger.insert(make_group(group_id, [[0]]))
    ledger.drop(DroppedGroup(group_id=3, reason=DropReason.EPISODE_TIMEOUT))
    assert admit_all(ledger) == [4]

    batch = ledger.sample(0).batch
    outcome = ledger.commit(batch, 1)
    assert [d.fate for d in outcome.departed] == ["consumed", "consumed"]
    assert outcome.released == () and admit_all(ledger) == []

    outcome = ledger.engine_loaded("e", 1)
    assert outcome.released == (ReleasedSlot(Slot(0, 0), "live"), ReleasedSlot(Slot(1, 0), "live"))
    assert admit_all(ledger) == [5, 6]

    counts = ledger.counts()
    assert (counts.in_flight, counts.buffered, counts.leased) == (3, 1, 0)
    assert (counts.consumed, counts.retired) == (2, 0)
    assert counts.dropped == {DropReason.EPISODE_TIMEOUT: 1}


def test_skipped_step_frees_its_slots_at_once():
    ledger = make_ledger(bound=0)
    for group_id in admit_all(ledger):
        ledger.insert(make_group(group_id, [[0]]))

    outcome = ledger.skip(ledger.sample(0).batch)

    assert {r.reason for r in outcome.released} == {DropReason.NONFINITE_UPDATE}
    assert admit_all(ledger) == [2, 3]
    assert ledger.counts().dropped == {DropReason.NONFINITE_UPDATE: 2}
    assert ledger.size_bytes == 0


def test_retired_group_waits_until_its_use_is_live():
    ledger = make_ledger(bound=0, uses=2)
    for group_id in admit_all(ledger):
        ledger.insert(make_group(group_id, [[0]]))
    ledger.commit(ledger.sample(0).batch, 1)

    outcome = ledger.sample(1)
    assert [d.fate for d in outcome.departed] == ["retired", "retired"]
    assert outcome.released == () and ledger.num_slots == 2

    assert len(ledger.engine_loaded("e", 1).released) == 2
    assert ledger.counts().retired == 2 and ledger.counts().dropped == {}


def test_stale_group_frees_its_slot_when_it_is_dropped():
    ledger = make_ledger(rule="drop", bound=0)
    admit_all(ledger)
    ledger.insert(make_group(0, [[0]]))

    outcome = ledger.sample(1)

    assert outcome.released == (ReleasedSlot(Slot(0, 0), DropReason.STALE),)
    assert ledger.take_cost().metrics()["lost_generation_fraction"] == 1.0


def test_group_that_is_not_in_flight_cannot_fail():
    ledger = make_ledger()
    admit_all(ledger)
    ledger.insert(make_group(0, [[0]]))

    with pytest.raises(RuntimeError, match="group 0 is not in flight, so it cannot fail"):
        ledger.drop(DroppedGroup(group_id=0, reason=DropReason.STEP_TIMEOUT))
    assert ledger.counts().buffered == 1


def test_cost_counts_a_group_once_and_its_batches_every_time():
    ledger = make_ledger(bound=1, batch=1, uses=2)
    admit_all(ledger)
    ledger.insert(make_group(0, [[0, 0], [0, 1, 1]]))

    ledger.commit(ledger.sample(1).batch, 2)
    first = ledger.take_cost()
    ledger.commit(ledger.sample(2).batch, 3)
    second = ledger.take_cost()

    assert (first.lost_tokens, first.kept_tokens) == (0, 5)
    assert (first.masked_tokens, first.trained_tokens) == (0, 5)
    assert (second.lost_tokens, second.kept_tokens) == (0, 0)
    assert (second.masked_tokens, second.trained_tokens) == (3, 2)


def test_given_back_batch_costs_nothing():
    ledger = make_ledger(bound=0)
    for group_id in admit_all(ledger):
        ledger.insert(make_group(group_id, [[0]]))

    ledger.give_back(ledger.sample(0).batch)

    assert ledger.counts().buffered == 2
    assert ledger.take_cost().metrics() == {}


def test_resume_keeps_groups_uses_and_counts():
    ledger = make_ledger(uses=2, bound=3)
    assert admit_all(ledger) == [0, 1, 2, 3]
    for group_id in (0, 1, 2):
        ledger.insert(make_group(group_id, [[0]]))
    ledger.commit(ledger.sample(0).batch, 1)
    ledger.sample(1)
    ledger.drop(DroppedGroup(group_id=3, reason=DropReason.STEP_TIMEOUT))

    resumed = make_ledger(uses=2, bound=3, live_version=1, state=ledger.state())

    counts = resumed.counts()
    assert (counts.in_flight, counts.buffered, counts.leased) == (0, 3, 0)
    assert counts.dropped == {DropReason.STEP_TIMEOUT: 1}
    assert admit_all(resumed) == [4]
    outcome = resumed.commit(resumed.sample(1).batch, 2)
    assert [d.stored.group.group_id for d in outcome.departed] == [0, 1]
    assert resumed.take_cost().kept_tokens == 0, "both were counted before the resume"


def test_import_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, skyrl_async.coordination.ledger, skyrl_async.replay.buffer;"
        "print([m for m in ('torch', 'ray', 'transformers', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
