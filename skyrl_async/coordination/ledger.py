"""The group ledger: admission and replay buffer as one, so that no group is lost between them.

The coordinator drives everything through it. One run is this loop, whatever ``K`` is::

    ledger.engine_joined(engine_id, version)           # every engine of the training pool
    while version < steps:
        while (slot := ledger.try_admit()) is not None:
            start the rollout of slot.group_id
        on each finished rollout:
            ledger.insert(group) | ledger.drop(dropped)    # then admit again
        batch = ledger.sample(version).batch
        if batch is None:
            wait for a rollout to finish or an engine to load, then go on
        result = learner.step(batch)                   # rollouts and loads go on meanwhile
        if result.skipped:
            ledger.skip(batch)                         # no new version: drop, release, admit
        else:
            version = result.policy_version
            ledger.commit(batch, version)
            publish(version)                           # in the background, the newest wins
        on each verified load: ledger.engine_loaded(engine_id, loaded)   # releases, so admit

A batch may be fetched ahead with ``ledger.sample(version + 1)`` while the learner works; when the
learner is free, ``ledger.recheck(batch, version)`` makes it right for the version that there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from skyrl_async.coordination.admission import Admission, ReleasedSlot, Slot
from skyrl_async.coordination.staleness import (
    StalenessCost,
    StalenessRule,
    count_loss_tokens,
    first_use_cost,
)
from skyrl_async.types import (
    AnyGroup,
    DepartedGroup,
    DroppedGroup,
    DropReason,
    GroupFate,
    SampledBatch,
    StoredGroup,
)

_Sampled = tuple[SampledBatch | None, tuple[DepartedGroup, ...]]


class Buffer(Protocol):
    """The replay buffer, as :class:`skyrl_async.replay.buffer.ReplayBuffer` describes it."""

    @property
    def num_buffered(self) -> int:
        """Groups that may be chosen."""

    @property
    def num_leased(self) -> int:
        """Groups in open batches."""

    def insert(self, group: AnyGroup) -> None:
        """Take in a finished group."""

    def restore(self, stored: StoredGroup) -> None:
        """Take in a group of a checkpoint."""

    def contents(self) -> tuple[StoredGroup, ...]:
        """Return all groups inside."""

    def sample(self, train_version: int, in_flight_versions: Mapping[int, int]) -> _Sampled:
        """Lease a full batch within the bound, if there is one."""

    def recheck(
        self, lease_id: int, train_version: int, in_flight_versions: Mapping[int, int]
    ) -> _Sampled:
        """Make a batch that was fetched ahead right for its step, or end its lease."""

    def commit(self, lease_id: int, made_version: int) -> tuple[DepartedGroup, ...]:
        """Record that a step has trained a batch."""

    def skip(self, lease_id: int) -> tuple[DepartedGroup, ...]:
        """Record that a step was skipped."""

    def give_back(self, lease_id: int) -> None:
        """Return a batch that will not be trained."""

    def tighten(self, rule: StalenessRule) -> None:
        """Apply another rule from now on."""

    def drop_all(self, reason: DropReason) -> tuple[DepartedGroup, ...]:
        """Let all buffered groups leave."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What one call changed.

    Attributes:
        batch: of :meth:`GroupLedger.sample` and :meth:`GroupLedger.recheck`, if there is one.
        departed: groups that left the buffer.
        released: slots that are free again; if there are any, groups may be admitted.
    """

    batch: SampledBatch | None = None
    departed: tuple[DepartedGroup, ...] = ()
    released: tuple[ReleasedSlot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """How many groups are in each state; their sum is the number of groups ever admitted."""

    in_flight: int
    buffered: int
    leased: int
    consumed: int
    retired: int
    dropped: Mapping[DropReason, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LedgerState:
    """What a checkpoint keeps; groups in flight are not in it and are played anew.

    Attributes:
        next_group_id: of the next group to be admitted.
        groups: buffered or leased, with their uses.
        consumed: groups so far.
        retired: groups so far.
        dropped: groups so far, by reason.
    """

    next_group_id: int
    groups: tuple[StoredGroup, ...]
    consumed: int
    retired: int
    dropped: Mapping[DropReason, int]


class GroupLedger:
    """Moves every group through admission and buffer, in exactly one state at a time.

    Args:
        admission: a new one, whose ``live_version`` is that of the run's start.
        buffer: a new replay buffer with the same ``B``, ``K`` and ``M``.
        rule: of that buffer.
        state: of the checkpoint that is resumed.

    Raises:
        ValueError: if the checkpoint's groups do not fit.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        buffer: Buffer,
        rule: StalenessRule | None = None,
        state: LedgerState | None = None,
    ) -> None:
        self._admission = admission
        self._rule = rule
        self._first_valid_group = 0
        self._buffer = buffer
        self._consumed = 0
        self._retired = 0
        self._dropped: Counter[DropReason] = Counter()
        self._used: set[int] = set()  # groups inside that a step has trained
        self._cost = StalenessCost()
        if state is not None:
            self._restore(state)

    @property
    def live_version(self) -> int:
        """The newest version that every engine of the training pool has loaded."""
        return self._admission.live_version

    @property
    def num_slots(self) -> int:
        """Groups admitted and not released."""
        return self._admission.num_slots

    @property
    def size_bytes(self) -> int:
        """Bytes of the groups that are buffered or leased."""
        return self._admission.held_bytes

    def counts(self) -> GroupCounts:
        """Return how many groups are in each state."""
        return GroupCounts(
            in_flight=self._admission.num_in_flight,
            buffered=self._buffer.num_buffered,
            leased=self._buffer.num_leased,
            consumed=self._consumed,
            retired=self._retired,
            dropped=MappingProxyType(dict(self._dropped)),
        )

    def take_cost(self) -> StalenessCost:
        """Return what the bound has cost since the last call."""
        cost, self._cost = self._cost, StalenessCost()
        return cost

    def try_admit(self) -> Slot | None:
        """Admit one group, or return None until a slot is released or bytes are free."""
        return self._admission.try_admit()

    def insert(self, group: AnyGroup) -> None:
        """Take a finished group from in flight into the buffer.

        Raises:
            RuntimeError: if it is not in flight, is larger than possible, or has a token older than
                its slot.
        """
        self._admission.insert(
            group.group_id,
            size_bytes=group.size_bytes,
            min_policy_version=group.min_policy_version,
        )
        self._buffer.insert(group)

    def drop(self, dropped: DroppedGroup) -> Outcome:
        """End a group in flight that failed.

        Raises:
            RuntimeError: if it is not in flight.
        """
        if not self._admission.is_in_flight(dropped.group_id):
            raise RuntimeError(f"group {dropped.group_id} is not in flight, so it cannot fail")
        released = self._admission.drop(dropped.group_id, dropped.reason)
        self._dropped[dropped.reason] += 1
        return Outcome(released=(released,))

    def sample(self, train_version: int) -> Outcome:
        """Lease a batch for the step that starts at ``train_version``; see ReplayBuffer.sample."""
        batch, departed = self._buffer.sample(train_version, self._admission.in_flight_versions)
        return Outcome(batch=batch, departed=departed, released=self._settle(departed))

    def recheck(self, batch: SampledBatch, train_version: int) -> Outcome:
        """Make a batch that was fetched ahead right for its step; see ReplayBuffer.recheck."""
        new_batch, departed = self._buffer.recheck(
            batch.lease_id, train_version, self._admission.in_flight_versions
        )
        return Outcome(batch=new_batch, departed=departed, released=self._settle(departed))

    def commit(self, batch: SampledBatch, made_version: int) -> Outcome:
        """Record that a step has trained the batch and made ``made_version``.

        Raises:
            RuntimeError: if the step did not start from the batch's ``train_version``.
        """
        departed = self._buffer.commit(batch.lease_id, made_version)
        for sampled in batch.groups:
            self._count_use(sampled.group, sampled.min_trainable_version)
        return Outcome(departed=departed, released=self._settle(departed))

    def skip(self, batch: SampledBatch) -> Outcome:
        """Drop the groups of a step that was not finite and made no version."""
        departed = self._buffer.skip(batch.lease_id)
        return Outcome(departed=departed, released=self._settle(departed))

    def give_back(self, batch: SampledBatch) -> None:
        """Return a batch that will not be trained."""
        self._buffer.give_back(batch.lease_id)

    @property
    def max_staleness(self) -> int:
        """``K``, as it is now.

        Raises:
            RuntimeError: if the ledger was made without its rule.
        """
        return self._known_rule().max_staleness

    def tighten(self, max_staleness: int) -> None:
        """Bound the staleness of all later batches by a smaller ``K``.

        Raises:
            ValueError: if it is larger than the present one: groups admitted for that might be
                dropped, but older ones would not have been played for it.
            RuntimeError: if the ledger was made without its rule.
        """
        rule = self._known_rule()
        if max_staleness > rule.max_staleness:
            raise ValueError(
                f"staleness.max can only be lowered, from {rule.max_staleness}, not to "
                f"{max_staleness}"
            )
        self._rule = replace(rule, max_staleness=max_staleness)
        self._admission.tighten(max_staleness)
        self._buffer.tighten(self._rule)

    def drop_all(self) -> Outcome:
        """Drop all buffered groups; those in flight are no longer valid (see :meth:`is_valid`)."""
        departed = self._buffer.drop_all(DropReason.ROLLBACK)
        self._first_valid_group = self._admission.next_group_id
        return Outcome(departed=departed, released=self._settle(departed))

    def is_valid(self, group_id: int) -> bool:
        """Return whether a group was admitted after the last :meth:`drop_all`."""
        return group_id >= self._first_valid_group

    def _known_rule(self) -> StalenessRule:
        if self._rule is None:
            raise RuntimeError("this ledger was made without its staleness rule")
        return self._rule

    def engine_joined(self, engine_id: str, version: int) -> Outcome:
        """Count an engine in that has verified ``version``, at least ``live_version``."""
        return Outcome(released=self._admission.engine_joined(engine_id, version))

    def engine_loaded(self, engine_id: str, version: int) -> Outcome:
        """Record that an engine has verified and loaded ``version``."""
        return Outcome(released=self._admission.engine_loaded(engine_id, version))

    def engine_left(self, engine_id: str) -> Outcome:
        """Count an engine out: it died, or was withdrawn."""
        return Outcome(released=self._admission.engine_left(engine_id))

    def state(self) -> LedgerState:
        """Return what a checkpoint between two steps keeps."""
        return LedgerState(
            next_group_id=self._admission.next_group_id,
            groups=self._buffer.contents(),
            consumed=self._consumed,
            retired=self._retired,
            dropped=dict(self._dropped),
        )

    def _restore(self, state: LedgerState) -> None:
        for stored in state.groups:
            group = stored.group
            self._admission.restore(
                group.group_id,
                size_bytes=group.size_bytes,
                min_policy_version=group.min_policy_version,
            )
            self._buffer.restore(stored)
            if stored.times_sampled:
                self._used.add(group.group_id)
        self._admission.number_from(state.next_group_id)
        self._consumed = state.consumed
        self._retired = state.retired
        self._dropped.update(state.dropped)

    def _settle(self, departed: Iterable[DepartedGroup]) -> tuple[ReleasedSlot, ...]:
        """Count the groups that left the buffer, and release their slots now or when live."""
        released: list[ReleasedSlot] = []
        for group in departed:
            stored, group_id = group.stored, group.stored.group.group_id
            self._used.discard(group_id)
            if group.reason is not None:
                self._dropped[group.reason] += 1
                released.append(self._admission.drop(group_id, group.reason))
                if group.reason is DropReason.STALE:
                    self._cost += first_use_cost(stored.group, min_trainable_version=None)
                continue
            if group.fate is GroupFate.CONSUMED:
                self._consumed += 1
            else:
                self._retired += 1
            if stored.made_version is None:
                raise RuntimeError(f"group {group_id} is {group.fate}, but no step has trained it")
            released += self._admission.release_when_live(group_id, stored.made_version)
        return tuple(released)

    def _count_use(self, group: AnyGroup, cut_off: int) -> None:
        trained = count_loss_tokens(group, min_trainable_version=cut_off)
        self._cost += StalenessCost(
            masked_tokens=group.num_generated_tokens - trained, trained_tokens=trained
        )
        if group.group_id not in self._used:
            self._used.add(group.group_id)
            self._cost += first_use_cost(group, min_trainable_version=cut_off)
