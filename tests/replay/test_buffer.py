from __future__ import annotations

import pytest

from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.replay.selectors import uniform
from skyrl_async.types import DropReason, SampledBatch, StoredGroup
from tests.coordination.groups import make_group


def make_buffer(rule: str = "mask", *, bound: int = 2, batch: int = 2, **values) -> ReplayBuffer:
    staleness_rule = StalenessRule(name=rule, max_staleness=bound, groups_per_step=batch)
    return ReplayBuffer(groups_per_step=batch, rule=staleness_rule, **values)


def fill(buffer: ReplayBuffer, **versions: list[list[int]]) -> None:
    """``g3=[[0, 1]]`` inserts group 3 with one member that sampled with versions 0 and 1."""
    for name, members in versions.items():
        buffer.insert(make_group(int(name[1:]), members))


def ids(batch: SampledBatch | None) -> list[int]:
    assert batch is not None
    return [sampled.group.group_id for sampled in batch.groups]


def left(departed) -> list[tuple[int, str, str | None]]:
    return [(d.stored.group.group_id, d.fate.value, d.reason) for d in departed]


def test_batch_is_full_or_none():
    buffer = make_buffer()
    fill(buffer, g0=[[0]])
    assert buffer.sample(0, {}) == (None, ())

    fill(buffer, g1=[[0]])
    batch, departed = buffer.sample(0, {})

    assert ids(batch) == [0, 1] and departed == ()
    assert (buffer.num_buffered, buffer.num_leased) == (0, 2)
    assert buffer.size_bytes == sum(g.group.size_bytes for g in batch.groups)


def test_fifo_takes_the_oldest_version_first_then_the_order_of_admission():
    buffer = make_buffer(batch=3)
    fill(buffer, g7=[[2]], g4=[[2]], g9=[[1]], g5=[[2]])

    assert ids(buffer.sample(2, {})[0]) == [9, 4, 5]


def test_uniform_selector_is_used():
    buffer = make_buffer(selector=uniform(1))
    for group_id in range(20):
        buffer.insert(make_group(group_id, [[0]]))

    chosen = [ids(buffer.sample(0, {})[0]) for _ in range(10)]

    assert sorted(i for batch in chosen for i in batch) == list(range(20)), (
        "every group exactly once"
    )
    assert chosen[0] != [0, 1]


def test_mask_sends_the_cut_off_and_drops_only_groups_without_loss_tokens():
    buffer = make_buffer("mask")
    fill(buffer, g0=[[2, 2], [1]], g1=[[0, 2], [3]], g2=[[4]])

    batch, departed = buffer.sample(5, {})

    assert ids(batch) == [1, 2]
    assert [g.min_trainable_version for g in batch.groups] == [3, 3]
    assert left(departed) == [(0, "dropped", DropReason.STALE)]


@pytest.mark.parametrize("rule", ["drop", "pace"])
def test_drop_lets_a_group_with_any_old_token_leave(rule):
    buffer = make_buffer(rule)
    fill(buffer, g0=[[2, 5]], g1=[[3, 5]], g2=[[4]])

    batch, departed = buffer.sample(5, {})

    assert ids(batch) == [1, 2]
    assert left(departed) == [(0, "dropped", DropReason.STALE)]


def test_too_old_groups_leave_even_if_there_is_no_batch():
    buffer = make_buffer()
    fill(buffer, g0=[[0]])

    batch, departed = buffer.sample(3, {})

    assert batch is None
    assert left(departed) == [(0, "dropped", DropReason.STALE)]
    assert (buffer.num_buffered, buffer.size_bytes) == (0, 0)


def test_pace_waits_for_the_group_in_flight_that_would_expire():
    buffer = make_buffer("pace", bound=1, batch=1)
    fill(buffer, g1=[[1]])

    assert buffer.sample(1, {0: 1})[0] is None, "deadline 1: it must be in this batch"
    assert ids(buffer.sample(1, {1: 1})[0]) == [1], "deadline 2: it can be in the next"


def test_pace_counts_buffered_and_in_flight_together():
    buffer = make_buffer("pace", bound=2, batch=1)
    fill(buffer, g0=[[0]], g1=[[1]])

    assert buffer.sample(2, {1: 1})[0] is None, "two with deadline 3 would be left for one step"
    assert ids(buffer.sample(2, {2: 1})[0]) == [0]


def paced(bound: int, num_groups: int) -> ReplayBuffer:
    """Return a buffer that holds a group of each of the versions up to ``num_groups``."""
    buffer = make_buffer("pace", bound=bound, batch=1)
    for version in range(num_groups):
        buffer.insert(make_group(version, [[version]]))
    return buffer


def test_a_smaller_bound_lets_the_oldest_leave_once_nothing_is_in_flight():
    """They were admitted for the larger one, and forbid every batch."""
    buffer = paced(bound=8, num_groups=6)
    buffer.tighten(StalenessRule(name="pace", max_staleness=1, groups_per_step=1))
    batch, departed = buffer.sample(4, {4: 1})
    assert batch is None and [d.stored.group.group_id for d in departed] == [0, 1, 2]
    # Deadlines 4, 5 and 6, of which the step at 4 trains the first, and the others follow.
    batch, departed = buffer.sample(5, {})
    assert ids(batch) == [4] and left(departed) == [(3, "dropped", DropReason.STALE)]

    stuck = make_buffer("pace", bound=8, batch=1)
    fill(stuck, g0=[[5]], g1=[[5]], g2=[[5]], g3=[[5]])
    stuck.tighten(StalenessRule(name="pace", max_staleness=1, groups_per_step=1))
    assert stuck.sample(5, {5: 1}) == (None, ()), "what is in flight may change it"
    batch, departed = stuck.sample(5, {})
    assert ids(batch) == [2] and [d.stored.group.group_id for d in departed] == [0, 1]
    assert all(d.reason is DropReason.STALE for d in departed)


def test_restored_groups_of_a_larger_bound_do_not_stop_training_either():
    buffer = make_buffer("pace", bound=1, batch=1)
    for stored in paced(bound=8, num_groups=4).contents():
        buffer.restore(stored)
    batch, departed = buffer.sample(3, {})
    assert ids(batch) and len(departed) + 1 + buffer.num_buffered == 4


def test_pace_counts_a_later_batch_as_left_over():
    buffer = make_buffer("pace", bound=1, batch=1)
    fill(buffer, g0=[[0]], g1=[[0]])
    first = buffer.sample(0, {})[0]
    assert ids(buffer.sample(1, {})[0]) == [1]

    # At version 1 the group of the second batch would expire in the first one's step.
    assert buffer.recheck(first.lease_id, 1, {})[0] is None


def test_commit_consumes_after_the_last_use():
    buffer = make_buffer(max_times_sampled=2)
    fill(buffer, g0=[[0]], g1=[[0]])

    first = buffer.sample(0, {})[0]
    assert buffer.commit(first.lease_id, 1) == ()
    assert (buffer.num_buffered, buffer.num_leased) == (2, 0)

    second = buffer.sample(1, {})[0]
    departed = buffer.commit(second.lease_id, 2)

    assert left(departed) == [(0, "consumed", None), (1, "consumed", None)]
    assert {(d.stored.times_sampled, d.stored.made_version) for d in departed} == {(2, 2)}
    assert (buffer.num_buffered, buffer.size_bytes) == (0, 0)


def test_too_old_after_a_use_is_retired_not_dropped():
    buffer = make_buffer(bound=0, max_times_sampled=2)
    fill(buffer, g0=[[0]], g1=[[0]])
    buffer.commit(buffer.sample(0, {})[0].lease_id, 1)

    batch, departed = buffer.sample(1, {})

    assert batch is None
    assert left(departed) == [(0, "retired", None), (1, "retired", None)]
    assert {d.stored.made_version for d in departed} == {1}


def test_commit_refuses_a_batch_made_for_another_version():
    buffer = make_buffer()
    fill(buffer, g0=[[0]], g1=[[0]])
    batch = buffer.sample(0, {})[0]

    with pytest.raises(RuntimeError, match="recheck a batch that was fetched ahead"):
        buffer.commit(batch.lease_id, 2)


def test_skipped_step_drops_its_groups():
    buffer = make_buffer()
    fill(buffer, g0=[[0]], g1=[[0]])

    departed = buffer.skip(buffer.sample(0, {})[0].lease_id)

    assert left(departed) == [(i, "dropped", DropReason.NONFINITE_UPDATE) for i in (0, 1)]
    assert (buffer.num_buffered, buffer.num_leased, buffer.size_bytes) == (0, 0, 0)


def test_given_back_batch_is_sampled_again():
    buffer = make_buffer()
    fill(buffer, g0=[[0]], g1=[[0]])
    batch = buffer.sample(0, {})[0]

    buffer.give_back(batch.lease_id)

    again = buffer.sample(0, {})[0]
    assert ids(again) == ids(batch)
    assert again.lease_id != batch.lease_id


def test_recheck_replaces_what_went_stale_and_renews_the_cut_off():
    buffer = make_buffer("drop")
    fill(buffer, g0=[[0]], g1=[[1]], g2=[[2]])
    batch = buffer.sample(2, {})[0]
    assert ids(batch) == [0, 1]

    renewed, departed = buffer.recheck(batch.lease_id, 3, {})

    assert ids(renewed) == [1, 2]
    assert (renewed.lease_id, renewed.train_version) == (batch.lease_id, 3)
    assert {g.min_trainable_version for g in renewed.groups} == {1}
    assert left(departed) == [(0, "dropped", DropReason.STALE)]


def test_recheck_at_a_lower_version_lowers_the_cut_off():
    """The step before was skipped, so the version that was expected has not come."""
    buffer = make_buffer("mask")
    fill(buffer, g0=[[0, 1]], g1=[[1]])
    batch = buffer.sample(3, {})[0]
    assert {g.min_trainable_version for g in batch.groups} == {1}

    renewed, departed = buffer.recheck(batch.lease_id, 2, {})

    assert departed == ()
    assert {g.min_trainable_version for g in renewed.groups} == {0}


def test_recheck_that_cannot_fill_the_batch_gives_the_rest_back():
    buffer = make_buffer("drop")
    fill(buffer, g0=[[0]], g1=[[1]])
    batch = buffer.sample(2, {})[0]

    renewed, departed = buffer.recheck(batch.lease_id, 3, {})

    assert renewed is None
    assert left(departed) == [(0, "dropped", DropReason.STALE)]
    assert (buffer.num_buffered, buffer.num_leased) == (1, 0)
    with pytest.raises(RuntimeError, match="no open lease 0"):
        buffer.give_back(batch.lease_id)


def test_batches_are_trained_in_the_order_in_which_they_were_sampled():
    buffer = make_buffer(batch=1)
    fill(buffer, g0=[[0]], g1=[[0]])
    first, second = buffer.sample(0, {})[0], buffer.sample(1, {})[0]

    for call in (lambda: buffer.commit(second.lease_id, 2), lambda: buffer.skip(second.lease_id)):
        with pytest.raises(RuntimeError, match="lease 1 cannot be trained before lease 0"):
            call()
    buffer.commit(first.lease_id, 1)
    assert left(buffer.commit(second.lease_id, 2)) == [(1, "consumed", None)]


def test_leases_end_once():
    buffer = make_buffer(batch=1)
    fill(buffer, g0=[[0]])
    lease_id = buffer.sample(0, {})[0].lease_id
    buffer.commit(lease_id, 1)

    for call in (
        lambda: buffer.commit(lease_id, 1),
        lambda: buffer.skip(lease_id),
        lambda: buffer.give_back(lease_id),
        lambda: buffer.recheck(lease_id, 1, {}),
    ):
        with pytest.raises(RuntimeError, match="no open lease 0; open are"):
            call()


def test_group_can_be_inside_once():
    buffer = make_buffer()
    fill(buffer, g0=[[0]], g1=[[0]])
    with pytest.raises(RuntimeError, match="group 0 was inserted twice"):
        fill(buffer, g0=[[0]])

    buffer.sample(0, {})
    with pytest.raises(RuntimeError, match="group 1 was inserted twice"):
        fill(buffer, g1=[[0]])


def test_token_from_the_future_is_refused():
    buffer = make_buffer(batch=1)
    fill(buffer, g0=[[3]])

    with pytest.raises(RuntimeError, match="newer than the step that starts at 2"):
        buffer.sample(2, {})


def test_contents_restore_with_their_uses():
    buffer = make_buffer(max_times_sampled=2)
    fill(buffer, g0=[[0]], g1=[[0]], g2=[[1]], g3=[[1]])
    buffer.commit(buffer.sample(1, {})[0].lease_id, 2)
    buffer.sample(2, {})

    resumed = make_buffer(max_times_sampled=2)
    for stored in buffer.contents():
        resumed.restore(stored)

    assert (resumed.num_buffered, resumed.size_bytes) == (4, buffer.size_bytes)
    departed = resumed.commit(resumed.sample(2, {})[0].lease_id, 3)
    assert left(departed) == [(0, "consumed", None), (1, "consumed", None)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selector": uniform(0)}, "pace needs replay.selector=fifo"),
        ({"max_times_sampled": 2}, "replay.max_times_sampled=1"),
    ],
)
def test_pace_refuses_another_order_and_reuse(values, message):
    with pytest.raises(ValueError, match=message):
        make_buffer("pace", **values)


def test_sizes_below_1_are_refused():
    with pytest.raises(ValueError, match="must be >= 1"):
        make_buffer(max_times_sampled=0)


def test_uses_must_fit_the_version_that_they_made():
    with pytest.raises(ValueError, match="times_sampled=1 does not fit made_version=None"):
        StoredGroup(group=make_group(0, [[0]]), times_sampled=1)
