"""Bugs that systems like this one had, or could have, as subclasses of the classes under test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_async.coordination.admission import Admission, ReleasedSlot, Slot
from skyrl_async.coordination.ledger import GroupLedger, Outcome
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import DepartedGroup, DropReason, GroupFate
from tests.coordination.world import Parts


class ReleasesByEquality(Admission):
    def _release_live(self):
        free = [entry for entry in self._awaiting if entry[0] == self._live_version]
        self._awaiting = [entry for entry in self._awaiting if entry not in free]
        return tuple(ReleasedSlot(slot, "live") for _, _, slot in free)


class LiveIsTheNewestEngine(Admission):
    def _update_live(self):
        self._live_version = max(self._engine_versions.values(), default=self._live_version)
        return self._release_live()


class LeavingEngineHoldsLiveBack(Admission):
    def engine_left(self, engine_id):
        del self._engine_versions[engine_id]
        return ()


class LateEngineJoinsBehindLive(Admission):
    """The check at the door is missing, so ``live_version`` and new tokens go backwards."""

    def engine_joined(self, engine_id, version):
        self._engine_versions[engine_id] = 0
        return self._update_live()


class BornAtNewestVersion(Admission):
    def try_admit(self):
        slot = super().try_admit()
        if slot is None:
            return None
        newest = Slot(slot.group_id, max(self._engine_versions.values(), default=0))
        self._take_off(slot.group_id)
        self._in_flight[slot.group_id] = newest
        self._in_flight_versions[newest.born_version] += 1
        return newest


class AdmitsByInFlightOnly(Admission):
    """Slots are free as soon as a group is finished."""

    @property
    def num_slots(self):
        return len(self._in_flight)


class AdmitsOneTooMany(Admission):
    @property
    def num_slots(self):
        return super().num_slots - (1 if super().num_slots == self.max_slots else 0)


class KeepsBytesOnDrop(Admission):
    def drop(self, group_id, reason):
        size_bytes = self._held[group_id][1] if group_id in self._held else 0
        released = super().drop(group_id, reason)
        self._held_bytes += size_bytes
        return released


class ReservesNothing(Admission):
    """The byte limit looks at what is held, not at what is on its way."""

    def try_admit(self):
        reserved, self._largest_group_bytes = self._largest_group_bytes, 0
        try:
            return super().try_admit()
        finally:
            self._largest_group_bytes = reserved


class ReservesTwice(Admission):
    """Holds producers back while fewer than a batch are ready or in flight."""

    def try_admit(self):
        self._largest_group_bytes *= 2
        try:
            return super().try_admit()
        finally:
            self._largest_group_bytes //= 2


class IgnoresGroupLimit(Admission):
    def __init__(self, *, capacity_groups=None, **values):
        super().__init__(**values)


class KeepsSlotsOfSkippedStep(GroupLedger):
    def skip(self, batch):
        departed = self._buffer.skip(batch.lease_id)
        for group in departed:
            self._dropped[group.reason] += 1
        return Outcome(departed=departed)


class ReleasesSlotsWhenSampled(GroupLedger):
    def sample(self, train_version):
        outcome = super().sample(train_version)
        freed = []
        for sampled in outcome.batch.groups if outcome.batch else ():
            slot = self._admission._held[sampled.group.group_id][0]
            freed.append(ReleasedSlot(slot, "live"))
        return replace(outcome, released=(*outcome.released, *freed))


class ReleasesTwice(GroupLedger):
    """The slot of a stale group is released by the buffer and again by the coordinator."""

    def sample(self, train_version):
        outcome = super().sample(train_version)
        return replace(outcome, released=outcome.released * 2)


class ReleasesRetiredAtOnce(GroupLedger):
    def _settle(self, departed):
        free = []
        for group in departed:
            if group.fate is GroupFate.RETIRED:
                self._retired += 1
                slot = self._admission._let_go(group.stored.group.group_id)
                free.append(ReleasedSlot(slot, "live"))
            else:
                free += super()._settle([group])
        return tuple(free)


class ForgetsNextGroupId(GroupLedger):
    def _restore(self, state):
        super()._restore(state)
        self._admission._next_group_id = 1 + max(
            (stored.group.group_id for stored in state.groups), default=-1
        )


class SkipsRecheck(GroupLedger):
    def recheck(self, batch, train_version):
        return Outcome(batch=batch)


class ChecksAtInsertOnly(ReplayBuffer):
    def _evict(self, train_version):
        return ()


class CountsRetiredAsDropped(ReplayBuffer):
    def _too_old(self, stored):
        return self._leave(stored, GroupFate.DROPPED, DropReason.STALE)


class RechecksWithoutReplacing(ReplayBuffer):
    """Stale groups leave a batch that was fetched ahead, and nothing takes their place."""

    def recheck(self, lease_id, train_version, in_flight_versions):
        lease = self._open(lease_id)
        kept = [g for g in lease.groups if self._rule.deadline(g.group) >= train_version]
        if len(kept) == len(lease.groups):
            return super().recheck(lease_id, train_version, in_flight_versions)
        self._end(lease_id)
        departed = [self._too_old(g) for g in lease.groups if g not in kept]
        return self._lease(lease_id, tuple(kept), train_version), tuple(departed)


class RechecksGroupsButNotCutOffs(ReplayBuffer):
    def recheck(self, lease_id, train_version, in_flight_versions):
        before = self._open(lease_id).train_version
        batch, departed = super().recheck(lease_id, train_version, in_flight_versions)
        if batch is not None:
            cut_off = self._rule.min_trainable_version(before)
            groups = tuple(replace(g, min_trainable_version=cut_off) for g in batch.groups)
            batch = replace(batch, groups=groups)
        return batch, departed


class ReturnsShortBatches(ReplayBuffer):
    """Takes what there is when groups had to leave."""

    def sample(self, train_version, in_flight_versions):
        before = self.num_buffered
        wanted = self._groups_per_step
        departed = self._evict(train_version)
        if 0 < self.num_buffered < wanted <= before:
            self._groups_per_step = self.num_buffered
        batch, more = super().sample(train_version, in_flight_versions)
        self._groups_per_step = wanted
        return batch, (*departed, *more)


class ConsumesAndKeeps(ReplayBuffer):
    """After a use that was not the last, a group is in the buffer and also reported consumed."""

    def commit(self, lease_id, made_version):
        leased = self._open(lease_id).groups
        departed = super().commit(lease_id, made_version)
        gone = {group.stored.group.group_id for group in departed}
        used = [
            replace(g, times_sampled=g.times_sampled + 1, made_version=made_version)
            for g in leased
            if g.group.group_id not in gone
        ]
        return (*departed, *(DepartedGroup(stored=g, fate=GroupFate.CONSUMED) for g in used))


class UsesOnceTooOften(ReplayBuffer):
    def __init__(self, *, max_times_sampled, **values):
        super().__init__(max_times_sampled=max_times_sampled, **values)
        self._max_times_sampled += 1


class LosesGivenBackGroups(ReplayBuffer):
    def give_back(self, lease_id):
        for stored in self._end(lease_id).groups[1:]:
            self._add(stored)
        self._inside &= set(self._buffered)


class ForgetsInFlightGroups(ReplayBuffer):
    """Pace that looks at buffered groups only."""

    def _complete(self, kept, train_version, in_flight_versions, *, later_leases):
        return super()._complete(kept, train_version, {}, later_leases=later_leases)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOffTooOld(StalenessRule):
    def min_trainable_version(self, train_version):
        return max(0, train_version - self.max_staleness - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOffTooNew(StalenessRule):
    def min_trainable_version(self, train_version):
        return max(0, train_version - self.max_staleness + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineTooLate(StalenessRule):
    def deadline(self, group):
        return StalenessRule.deadline(self, group) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineTooEarly(StalenessRule):
    def deadline(self, group):
        return StalenessRule.deadline(self, group) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DropsByNewestToken(StalenessRule):
    def deadline(self, group):
        return group.max_policy_version + self.max_staleness


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceWithoutLookAhead(StalenessRule):
    """Waits only while a group left over would expire in this very step."""

    def allows(self, left_over, *, train_version):
        return not any(
            count and version + self.max_staleness <= train_version
            for version, count in left_over.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceWaitsForAll(StalenessRule):
    """Never leaves any group over, so that more groups than one batch wait for each other."""

    def allows(self, left_over, *, train_version):
        return not any(left_over.values())


@dataclass(frozen=True)
class Bug:
    """A seeded bug, the invariants that may name it, and settings under which it can show."""

    parts: Parts
    caught_by: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        default = Parts()
        for part in ("rule", "admission", "buffer", "ledger"):
            value = getattr(self.parts, part)
            if value is not getattr(default, part):
                return value.__name__
        raise AssertionError("a bug changes one part")


WIDE = {"capacity_groups": None, "spare_bytes": 1 << 20}
REUSE = {"rule": "mask", "max_times_sampled": 2, "max_staleness": 0, **WIDE}
MASK = {"rule": "mask", "max_times_sampled": 1, "max_staleness": 1, "groups_per_step": 2, **WIDE}
DROP = {"rule": "drop", "max_times_sampled": 1, "max_staleness": 1, **WIDE}
PACE = {"rule": "pace", **WIDE}
TIGHT = {"spare_bytes": 1, "capacity_groups": None, "max_times_sampled": 1}

BUGS = [
    Bug(Parts(admission=ReleasesByEquality), "slots|deadlock"),
    Bug(Parts(admission=LiveIsTheNewestEngine), "live|went backwards|slots", {"num_engines": 3}),
    Bug(Parts(admission=LeavingEngineHoldsLiveBack), "live", {"num_engines": 3}),
    Bug(Parts(admission=LateEngineJoinsBehindLive), "live|back to"),
    Bug(Parts(admission=BornAtNewestVersion), "live|went backwards", {"num_engines": 3}),
    Bug(Parts(admission=AdmitsByInFlightOnly), "slots"),
    Bug(Parts(admission=AdmitsOneTooMany), "slots"),
    Bug(Parts(admission=KeepsBytesOnDrop), "bytes"),
    Bug(Parts(admission=ReservesNothing), "capacity", TIGHT),
    Bug(Parts(admission=ReservesTwice), "deadlock", TIGHT),
    Bug(Parts(admission=IgnoresGroupLimit), "capacity", {"capacity_groups": 3}),
    Bug(Parts(ledger=KeepsSlotsOfSkippedStep), "slots|deadlock|bytes"),
    Bug(Parts(ledger=ReleasesSlotsWhenSampled), "slots"),
    Bug(Parts(ledger=ReleasesTwice), "slots"),
    Bug(Parts(ledger=ReleasesRetiredAtOnce), "slots", REUSE),
    Bug(Parts(ledger=ForgetsNextGroupId), "admitted twice"),
    Bug(Parts(ledger=SkipsRecheck), "bound|cut-off|recheck"),
    Bug(Parts(buffer=ChecksAtInsertOnly), "bound|loss tokens", DROP),
    Bug(Parts(buffer=CountsRetiredAsDropped), "fate", REUSE),
    Bug(Parts(buffer=RechecksWithoutReplacing), "full batch", {**DROP, "max_staleness": 2}),
    Bug(Parts(buffer=RechecksGroupsButNotCutOffs), "bound|cut-off", {**MASK, "max_staleness": 2}),
    Bug(Parts(buffer=ReturnsShortBatches), "full batch", DROP),
    Bug(Parts(buffer=ConsumesAndKeeps), "states|neither", REUSE),
    Bug(Parts(buffer=UsesOnceTooOften), "states"),
    Bug(Parts(buffer=LosesGivenBackGroups), "states", {**MASK, "max_staleness": 2}),
    Bug(Parts(buffer=ForgetsInFlightGroups), "pace", PACE),
    Bug(Parts(rule=CutOffTooOld), "bound|cut-off", MASK),
    Bug(Parts(rule=CutOffTooNew), "cut-off|loss tokens", MASK),
    Bug(Parts(rule=DeadlineTooLate), "bound|loss tokens", DROP),
    Bug(Parts(rule=DeadlineTooLate), "loss tokens", MASK),
    Bug(Parts(rule=DeadlineTooEarly), "waste"),
    Bug(Parts(rule=DropsByNewestToken), "bound", DROP),
    Bug(Parts(rule=PaceWithoutLookAhead), "deadlock", {**PACE, "max_staleness": 3}),
    Bug(Parts(rule=PaceWaitsForAll), "deadlock", {**PACE, "max_staleness": 2}),
]
