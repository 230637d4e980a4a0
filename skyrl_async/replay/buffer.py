"""The replay buffer: finished groups wait here until learner steps have used them.

The buffer is where the staleness bound is enforced: whatever was admitted, published or delayed, a
batch is only made of tokens that the rule allows at the version from which its step starts. It owns
no threads and no clock, and every call takes effect at once.

A group inside is *buffered* (may be chosen) or *leased* (in a batch that a step will train)::

    insert ──► buffered ──sample──► leased ──commit──► buffered again, or consumed
                  │  ▲                │  ├──skip─────► dropped (nonfinite_update)
                  │  └───give_back────┘  └──recheck──► as sample and give_back, per group
                  └──too old──► dropped (stale), or retired if a step has trained it

Every call that lets groups leave returns them as :class:`DepartedGroup`, each exactly once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from skyrl_async.replay.selectors import Selector, fifo
from skyrl_async.types import (
    AnyGroup,
    DepartedGroup,
    DropReason,
    GroupFate,
    SampledBatch,
    SampledGroup,
    StoredGroup,
)


class BoundRule(Protocol):
    """What the buffer must know about the staleness bound."""

    @property
    def needs_order(self) -> bool:
        """Whether groups must be used once and oldest first."""

    def min_trainable_version(self, train_version: int) -> int:
        """Return the cut-off: older tokens stay out of the step at ``train_version``."""

    def deadline(self, group: AnyGroup) -> int:
        """Return the newest version whose step may still train the group."""

    def allows(self, left_over: Mapping[int, int], *, train_version: int) -> bool:
        """Return whether a batch may be taken that leaves ``left_over`` groups, by version."""


@dataclass(frozen=True, slots=True)
class _Lease:
    train_version: int
    groups: tuple[StoredGroup, ...]


class ReplayBuffer:
    """Holds finished groups, and leases them to learner steps in full batches within the bound.

    Args:
        groups_per_step: groups in every batch.
        rule: the staleness rule; its ``K`` is the guarantee.
        selector: which of the buffered groups make a batch.
        max_times_sampled: learner steps that may use one group.

    Raises:
        ValueError: on sizes below 1, or a rule that needs order with another selector than ``fifo``
            or with more than one use.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        rule: BoundRule,
        selector: Selector = fifo,
        max_times_sampled: int = 1,
    ) -> None:
        if groups_per_step < 1 or max_times_sampled < 1:
            raise ValueError(
                f"learner.groups_per_step={groups_per_step} and replay.max_times_sampled="
                f"{max_times_sampled} must be >= 1"
            )
        if rule.needs_order and (selector is not fifo or max_times_sampled > 1):
            raise ValueError(
                "staleness.rule=pace needs replay.selector=fifo and replay.max_times_sampled=1, "
                f"got {selector} and {max_times_sampled}"
            )
        self._groups_per_step = groups_per_step
        self._max_times_sampled = max_times_sampled
        self._rule = rule
        self._selector = selector
        self._inside: set[int] = set()  # group ids, buffered or leased
        self._buffered: dict[int, StoredGroup] = {}
        self._by_age: list[tuple[int, int]] = []  # (oldest version, group id), sorted
        self._by_deadline: dict[int, set[int]] = {}
        self._versions: Counter[int] = Counter()  # oldest version -> number of buffered groups
        self._leases: dict[int, _Lease] = {}  # in the order in which they were sampled
        self._next_lease_id = 0
        self._size_bytes = 0
        self._had_larger_bound = False

    @property
    def num_buffered(self) -> int:
        """Groups that may be chosen."""
        return len(self._buffered)

    @property
    def num_leased(self) -> int:
        """Groups in batches that are neither committed, skipped nor given back."""
        return len(self._inside) - len(self._buffered)

    @property
    def size_bytes(self) -> int:
        """Bytes of all groups inside, buffered and leased."""
        return self._size_bytes

    def insert(self, group: AnyGroup) -> None:
        """Take in a finished group.

        Raises:
            RuntimeError: if a group with this id is inside.
        """
        self._take_in(StoredGroup(group=group))

    def restore(self, stored: StoredGroup) -> None:
        """Take in a group of :meth:`contents`, with the uses that it has had.

        Raises:
            RuntimeError: if a group with this id is inside.
        """
        self._had_larger_bound = True  # perhaps: the checkpoint does not say
        self._take_in(stored)

    def _take_in(self, stored: StoredGroup) -> None:
        group_id = stored.group.group_id
        if group_id in self._inside:
            raise RuntimeError(f"group {group_id} was inserted twice")
        self._inside.add(group_id)
        self._size_bytes += stored.group.size_bytes
        self._add(stored)

    def contents(self) -> tuple[StoredGroup, ...]:
        """Return all groups inside, leased ones as if given back, for a checkpoint."""
        leased = (stored for lease in self._leases.values() for stored in lease.groups)
        return (*self._buffered.values(), *leased)

    def tighten(self, rule: BoundRule) -> None:
        """Apply another rule from now on, also to what is inside; open leases keep theirs."""
        self._rule = rule
        self._had_larger_bound = True
        self._by_deadline = {}
        for group_id, stored in self._buffered.items():
            self._by_deadline.setdefault(rule.deadline(stored.group), set()).add(group_id)

    def drop_all(self, reason: DropReason) -> tuple[DepartedGroup, ...]:
        """Let all buffered groups leave; those in open leases stay."""
        stored = list(self._buffered.values())
        for one in stored:
            self._remove(one)
        return tuple(
            self._leave(one, GroupFate.RETIRED)
            if one.times_sampled
            else self._leave(one, GroupFate.DROPPED, reason)
            for one in stored
        )

    def sample(
        self, train_version: int, in_flight_versions: Mapping[int, int]
    ) -> tuple[SampledBatch | None, tuple[DepartedGroup, ...]]:
        """Lease a full batch for the step that starts at ``train_version``.

        Groups that are too old for this step leave first, whether or not a batch can be made. Where
        after :meth:`tighten` or :meth:`restore` there are more groups than the rule can train in
        time, and nothing is in flight any more, the oldest ones leave as stale.

        Args:
            train_version: policy version from which the step will start. For a batch that is
                fetched while another step runs, the version that this one will make if it is not
                skipped, and never more; :meth:`recheck` the batch when it is known.
            in_flight_versions: number of groups in flight, by a lower bound of their oldest policy
                version.

        Returns:
            The batch, or None while the rule or too few groups forbid it; and the groups that left.

        Raises:
            RuntimeError: if a chosen group has a token newer than ``train_version``.
        """
        departed = self._evict(train_version)
        groups = self._complete((), train_version, in_flight_versions, later_leases=())
        while groups is None and self._is_stuck(in_flight_versions):
            oldest = self._buffered[self._by_age[0][1]]
            self._remove(oldest)
            departed = (*departed, self._too_old(oldest))
            groups = self._complete((), train_version, in_flight_versions, later_leases=())
        if groups is None:
            return None, departed
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        return self._lease(lease_id, groups, train_version), departed

    def recheck(
        self, lease_id: int, train_version: int, in_flight_versions: Mapping[int, int]
    ) -> tuple[SampledBatch | None, tuple[DepartedGroup, ...]]:
        """Make a batch that was fetched ahead right for the version from which its step starts.

        Cut-offs are computed anew, and groups that went stale are replaced. Where that is not
        possible the lease ends and its groups are buffered again.

        Args:
            lease_id: of the batch.
            train_version: policy version from which the step starts.
            in_flight_versions: as for :meth:`sample`.

        Returns:
            The batch under the same lease, or None; and the groups that left.

        Raises:
            RuntimeError: if there is no such lease.
        """
        lease = self._end(lease_id)
        departed = list(self._evict(train_version))
        kept = []
        for stored in lease.groups:
            if self._rule.deadline(stored.group) < train_version:
                departed.append(self._too_old(stored))
            else:
                kept.append(stored)
        later = [other for id_, other in self._leases.items() if id_ > lease_id]
        groups = self._complete(kept, train_version, in_flight_versions, later_leases=later)
        if groups is None:
            for stored in kept:
                self._add(stored)
            return None, tuple(departed)
        return self._lease(lease_id, groups, train_version), tuple(departed)

    def commit(self, lease_id: int, made_version: int) -> tuple[DepartedGroup, ...]:
        """Record that a step has trained the batch; return the groups that had their last use.

        Raises:
            RuntimeError: if there is no such lease, if an older one is open, or if the step did not
                start from the version for which the batch was made.
        """
        lease = self._turn(lease_id)
        if made_version != lease.train_version + 1:
            raise RuntimeError(
                f"lease {lease_id} was made for a step that starts at version "
                f"{lease.train_version}, but that step made version {made_version}; recheck a "
                "batch that was fetched ahead"
            )
        del self._leases[lease_id]
        departed = []
        for stored in lease.groups:
            used = replace(
                stored, times_sampled=stored.times_sampled + 1, made_version=made_version
            )
            if used.times_sampled < self._max_times_sampled:
                self._add(used)
            else:
                departed.append(self._leave(used, GroupFate.CONSUMED))
        return tuple(departed)

    def skip(self, lease_id: int) -> tuple[DepartedGroup, ...]:
        """Drop the groups of a step that changed nothing, because it was not finite.

        Raises:
            RuntimeError: if there is no such lease, or if an older one is open.
        """
        lease = self._turn(lease_id)
        del self._leases[lease_id]
        return tuple(
            self._leave(stored, GroupFate.DROPPED, DropReason.NONFINITE_UPDATE)
            for stored in lease.groups
        )

    def give_back(self, lease_id: int) -> None:
        """End a lease whose batch will not be trained; its groups are buffered as before.

        Raises:
            RuntimeError: if there is no such lease.
        """
        for stored in self._end(lease_id).groups:
            self._add(stored)

    def _complete(
        self,
        kept: Iterable[StoredGroup],
        train_version: int,
        in_flight_versions: Mapping[int, int],
        *,
        later_leases: Iterable[_Lease],
    ) -> tuple[StoredGroup, ...] | None:
        """Add chosen groups to the kept ones up to a full batch, if the rule allows the batch."""
        kept = tuple(kept)
        missing = self._groups_per_step - len(kept)
        if missing > len(self._by_age):
            return None
        positions = self._selector(len(self._by_age), missing)
        chosen = [self._buffered[self._by_age[position][1]] for position in positions]
        left_over = Counter(in_flight_versions)
        left_over.update(self._versions)
        left_over.subtract(stored.group.min_policy_version for stored in chosen)
        left_over.update(
            stored.group.min_policy_version for lease in later_leases for stored in lease.groups
        )
        if not self._rule.allows(left_over, train_version=train_version):
            return None
        for stored in (*kept, *chosen):
            if stored.group.max_policy_version > train_version:
                raise RuntimeError(
                    f"group {stored.group.group_id} has tokens of version "
                    f"{stored.group.max_policy_version}, newer than the step that starts at "
                    f"{train_version}: an engine has weights that the learner has not made"
                )
        for stored in chosen:
            self._remove(stored)
        return (*kept, *chosen)

    def _is_stuck(self, in_flight_versions: Mapping[int, int]) -> bool:
        """Whether groups admitted for a larger bound forbid every batch."""
        if not self._had_larger_bound or self._leases or any(in_flight_versions.values()):
            return False
        return len(self._by_age) >= self._groups_per_step

    def _lease(
        self, lease_id: int, groups: tuple[StoredGroup, ...], train_version: int
    ) -> SampledBatch:
        self._leases[lease_id] = _Lease(train_version, groups)
        cut_off = self._rule.min_trainable_version(train_version)
        return SampledBatch(
            lease_id=lease_id,
            train_version=train_version,
            groups=tuple(
                SampledGroup(group=stored.group, min_trainable_version=cut_off) for stored in groups
            ),
        )

    def _open(self, lease_id: int) -> _Lease:
        if lease_id not in self._leases:
            raise RuntimeError(f"no open lease {lease_id}; open are {sorted(self._leases)}")
        return self._leases[lease_id]

    def _turn(self, lease_id: int) -> _Lease:
        """Return the lease whose step has ended: always the one that was sampled first."""
        lease = self._open(lease_id)
        if lease_id != min(self._leases):
            raise RuntimeError(
                f"lease {lease_id} cannot be trained before lease {min(self._leases)}: batches are "
                "trained in the order in which they were sampled"
            )
        return lease

    def _end(self, lease_id: int) -> _Lease:
        lease = self._open(lease_id)
        del self._leases[lease_id]
        return lease

    def _evict(self, train_version: int) -> tuple[DepartedGroup, ...]:
        """Let the buffered groups leave that the step at ``train_version`` may not train."""
        passed = sorted(d for d in self._by_deadline if d < train_version)
        stale = [self._buffered[id_] for d in passed for id_ in sorted(self._by_deadline[d])]
        for stored in stale:
            self._remove(stored)
        return tuple(self._too_old(stored) for stored in stale)

    def _too_old(self, stored: StoredGroup) -> DepartedGroup:
        if stored.times_sampled:
            return self._leave(stored, GroupFate.RETIRED)
        return self._leave(stored, GroupFate.DROPPED, DropReason.STALE)

    def _leave(
        self, stored: StoredGroup, fate: GroupFate, reason: DropReason | None = None
    ) -> DepartedGroup:
        self._inside.remove(stored.group.group_id)
        self._size_bytes -= stored.group.size_bytes
        return DepartedGroup(stored=stored, fate=fate, reason=reason)

    def _add(self, stored: StoredGroup) -> None:
        group = stored.group
        self._buffered[group.group_id] = stored
        insort(self._by_age, (group.min_policy_version, group.group_id))
        self._by_deadline.setdefault(self._rule.deadline(group), set()).add(group.group_id)
        self._versions[group.min_policy_version] += 1

    def _remove(self, stored: StoredGroup) -> None:
        group = stored.group
        del self._buffered[group.group_id]
        key = (group.min_policy_version, group.group_id)
        del self._by_age[bisect_left(self._by_age, key)]
        deadline = self._rule.deadline(group)
        self._by_deadline[deadline].discard(group.group_id)
        if not self._by_deadline[deadline]:
            del self._by_deadline[deadline]
        self._versions[group.min_policy_version] -= 1
        if not self._versions[group.min_policy_version]:
            del self._versions[group.min_policy_version]
