"""Admission: one slot for every group, from before its rollout until its training is live.

Admission is what keeps waste low and memory bounded; it is not the staleness guarantee, which the
replay buffer holds. It knows three things about the groups that have a slot::

    try_admit ──► in flight ──insert──► held ──release_when_live──► awaiting ──live──► released
                      │                   │
                      └───────drop────────┴──────────────────────────────────────────► released

and one about the engines: the version that each has loaded. ``live_version`` is the smallest of
them, and never falls. Proofs are in ``STALENESS.md`` beside this file.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from skyrl_async.coordination.staleness import max_admitted
from skyrl_async.types import DropReason

ReleaseReason = DropReason | Literal["live"]
"""Why a slot was released: its group was dropped, or the weights trained on it are live."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Permission for one group to exist.

    Attributes:
        group_id: unique within the run.
        born_version: ``live_version`` at admission, a lower bound of every token's version.
    """

    group_id: int
    born_version: int


@dataclass(frozen=True, slots=True)
class ReleasedSlot:
    """A slot that is free again.

    Attributes:
        slot: as it was admitted.
        reason: a :class:`DropReason`, or ``live``.
    """

    slot: Slot
    reason: ReleaseReason


class Admission:
    """Decides when a new group may start, and releases every slot exactly once.

    Args:
        groups_per_step: ``B``.
        max_staleness: ``K``.
        max_times_sampled: ``M``.
        largest_group_bytes: no finished group is larger; reserved for every group in flight.
        capacity_bytes: of the groups held (buffered and leased), reservations included.
        capacity_groups: groups in flight or held; None for as many as there are slots.
        live_version: that every engine has at the start of the run.
        publishing_lag: versions that the learner publishes late; a slot is released as soon as the
            newest version to be published so far is live.

    Raises:
        ValueError: if a capacity is so small that actors and learner would wait for each other.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        largest_group_bytes: int,
        capacity_bytes: int,
        capacity_groups: int | None = None,
        max_times_sampled: int = 1,
        live_version: int = 0,
        publishing_lag: int = 0,
    ) -> None:
        if capacity_bytes <= groups_per_step * largest_group_bytes:
            raise ValueError(
                f"replay.capacity_bytes={capacity_bytes} must exceed "
                f"{groups_per_step * largest_group_bytes} (learner.groups_per_step "
                f"{groups_per_step} x the largest group of {largest_group_bytes} bytes)"
            )
        if capacity_groups is not None and capacity_groups < groups_per_step:
            raise ValueError(
                f"replay.capacity_groups={capacity_groups} must be at least "
                f"learner.groups_per_step={groups_per_step}"
            )
        self._groups_per_step = groups_per_step
        self._max_times_sampled = max_times_sampled
        self.max_slots = 0
        self.tighten(max_staleness)
        self._largest_group_bytes = largest_group_bytes
        self._capacity_bytes = capacity_bytes
        self._capacity_groups = self.max_slots if capacity_groups is None else capacity_groups
        self._live_version = live_version
        self._publishing_lag = publishing_lag
        self._next_group_id = 0
        self._engine_versions: dict[str, int] = {}
        self._in_flight: dict[int, Slot] = {}
        self._in_flight_versions: Counter[int] = Counter()
        self._held: dict[int, tuple[Slot, int]] = {}  # slot and bytes
        self._held_bytes = 0
        self._awaiting: list[tuple[int, int, Slot]] = []  # heap of (version, group id, slot)

    @property
    def live_version(self) -> int:
        """The newest version that every engine of the training pool has loaded."""
        return self._live_version

    @property
    def next_group_id(self) -> int:
        """Id of the next group to be admitted."""
        return self._next_group_id

    @property
    def num_slots(self) -> int:
        """Groups admitted and not released."""
        return len(self._in_flight) + len(self._held) + len(self._awaiting)

    @property
    def num_in_flight(self) -> int:
        """Groups admitted and neither inserted nor dropped."""
        return len(self._in_flight)

    @property
    def in_flight_versions(self) -> Mapping[int, int]:
        """Number of groups in flight by ``born_version``; a live view."""
        return MappingProxyType(self._in_flight_versions)

    @property
    def held_bytes(self) -> int:
        """Bytes of the groups that are buffered or leased."""
        return self._held_bytes

    def group_ids(self) -> frozenset[int]:
        """Return the groups that have a slot."""
        awaiting = (group_id for _, group_id, _ in self._awaiting)
        return frozenset((*self._in_flight, *self._held, *awaiting))

    def is_in_flight(self, group_id: int) -> bool:
        """Return whether the group was admitted and neither inserted nor dropped."""
        return group_id in self._in_flight

    def tighten(self, max_staleness: int) -> None:
        """Admit for another ``K`` from now on; what has a slot keeps it."""
        self.max_slots = max_admitted(
            groups_per_step=self._groups_per_step,
            max_staleness=max_staleness,
            max_times_sampled=self._max_times_sampled,
        )

    def try_admit(self) -> Slot | None:
        """Admit one group, or return None while slots, groups or bytes are used up."""
        reserved_bytes = (self.num_in_flight + 1) * self._largest_group_bytes
        if (
            self.num_slots >= self.max_slots
            or self.num_in_flight + len(self._held) >= self._capacity_groups
            or self._held_bytes + reserved_bytes > self._capacity_bytes
        ):
            return None
        slot = Slot(self._next_group_id, self._live_version)
        self._next_group_id += 1
        self._in_flight[slot.group_id] = slot
        self._in_flight_versions[slot.born_version] += 1
        return slot

    def insert(self, group_id: int, *, size_bytes: int, min_policy_version: int) -> None:
        """Turn the reservation of a finished group into its real size.

        Raises:
            RuntimeError: if the group is not in flight, is larger than the largest possible group,
                or has a token older than its slot.
        """
        if group_id not in self._in_flight:
            raise RuntimeError(f"group {group_id} is not in flight, so it cannot be inserted")
        slot = self._in_flight[group_id]
        if min_policy_version < slot.born_version:
            raise RuntimeError(
                f"group {group_id} has a token of version {min_policy_version}, but was admitted "
                f"when every engine had version {slot.born_version}: an engine went backwards"
            )
        self._hold(slot, size_bytes)
        self._take_off(group_id)

    def number_from(self, next_group_id: int) -> None:
        """Go on counting groups where a checkpoint stopped.

        Raises:
            RuntimeError: if ids from there on were given already.
        """
        if next_group_id < self._next_group_id:
            raise RuntimeError(
                f"cannot number groups from {next_group_id}: {self._next_group_id} is next"
            )
        self._next_group_id = next_group_id

    def restore(self, group_id: int, *, size_bytes: int, min_policy_version: int) -> None:
        """Give a slot to a group that a checkpoint held; admission waits while there are too many.

        Raises:
            RuntimeError: if a group with this id was admitted.
            ValueError: if the group does not fit into the buffer.
        """
        if group_id in self.group_ids():
            raise RuntimeError(f"group {group_id} was admitted twice")
        reserved_bytes = self.num_in_flight * self._largest_group_bytes
        if (
            self._held_bytes + size_bytes + reserved_bytes > self._capacity_bytes
            or self.num_in_flight + len(self._held) >= self._capacity_groups
        ):
            raise ValueError(
                f"the checkpoint's groups do not fit into replay.capacity_bytes="
                f"{self._capacity_bytes}, replay.capacity_groups={self._capacity_groups}; "
                "resume with limits as large as those of the run that made it"
            )
        self._hold(Slot(group_id, min_policy_version), size_bytes)
        self._next_group_id = max(self._next_group_id, group_id + 1)

    def drop(self, group_id: int, reason: DropReason) -> ReleasedSlot:
        """Release the slot of a group, in flight or held, that will not be trained (again).

        Raises:
            RuntimeError: if the group is neither in flight nor held.
        """
        if group_id in self._in_flight:
            return ReleasedSlot(self._take_off(group_id), reason)
        return ReleasedSlot(self._let_go(group_id), reason)

    def release_when_live(self, group_id: int, made_version: int) -> tuple[ReleasedSlot, ...]:
        """Release the slot of a group after its last use, as soon as that use is live.

        Args:
            group_id: of a held group; its bytes are free at once.
            made_version: policy version that its last use made.

        Returns:
            The slots that are free now: this one if the version is live, otherwise none.

        Raises:
            RuntimeError: if the group is not held.
        """
        awaited = made_version - self._publishing_lag
        heapq.heappush(self._awaiting, (awaited, group_id, self._let_go(group_id)))
        return self._release_live()

    def engine_joined(self, engine_id: str, version: int) -> tuple[ReleasedSlot, ...]:
        """Count an engine in; return the slots that this releases.

        Raises:
            RuntimeError: if it is in the pool, or behind ``live_version``: groups admitted since
                would get tokens older than their slots.
        """
        if engine_id in self._engine_versions:
            raise RuntimeError(f"engine {engine_id} is in the pool already")
        if version < self._live_version:
            raise RuntimeError(
                f"engine {engine_id} has version {version}; it must load version "
                f"{self._live_version} or newer before it joins"
            )
        self._engine_versions[engine_id] = version
        return self._update_live()

    def engine_loaded(self, engine_id: str, version: int) -> tuple[ReleasedSlot, ...]:
        """Record the version that an engine has verified and loaded; return the slots released.

        Raises:
            RuntimeError: if the engine is not in the pool or had a newer version.
        """
        if engine_id not in self._engine_versions:
            raise RuntimeError(f"engine {engine_id} is not in the pool, so it cannot load")
        if version < self._engine_versions[engine_id]:
            raise RuntimeError(
                f"engine {engine_id} went from version {self._engine_versions[engine_id]} back to "
                f"{version}"
            )
        self._engine_versions[engine_id] = version
        return self._update_live()

    def engine_left(self, engine_id: str) -> tuple[ReleasedSlot, ...]:
        """Count an engine out, dead or withdrawn; return the slots that this releases.

        Raises:
            RuntimeError: if the engine is not in the pool.
        """
        if engine_id not in self._engine_versions:
            raise RuntimeError(f"engine {engine_id} is not in the pool, so it cannot leave")
        del self._engine_versions[engine_id]
        return self._update_live()

    def _update_live(self) -> tuple[ReleasedSlot, ...]:
        """Re-evaluate ``live_version``; without any engine it stays as it is."""
        self._live_version = min(self._engine_versions.values(), default=self._live_version)
        return self._release_live()

    def _release_live(self) -> tuple[ReleasedSlot, ...]:
        """Release by ``>=``: versions that were superseded before they were sent never go live."""
        released = []
        while self._awaiting and self._awaiting[0][0] <= self._live_version:
            released.append(ReleasedSlot(heapq.heappop(self._awaiting)[2], "live"))
        return tuple(released)

    def _hold(self, slot: Slot, size_bytes: int) -> None:
        if size_bytes > self._largest_group_bytes:
            raise RuntimeError(
                f"group {slot.group_id} has {size_bytes} bytes, more than the "
                f"{self._largest_group_bytes} that were reserved for it"
            )
        self._held[slot.group_id] = (slot, size_bytes)
        self._held_bytes += size_bytes

    def _take_off(self, group_id: int) -> Slot:
        slot = self._in_flight.pop(group_id)
        self._in_flight_versions[slot.born_version] -= 1
        if not self._in_flight_versions[slot.born_version]:
            del self._in_flight_versions[slot.born_version]
        return slot

    def _let_go(self, group_id: int) -> Slot:
        if group_id not in self._held:
            raise RuntimeError(
                f"group {group_id} is neither in flight nor held: its slot was released before, or "
                "it was never admitted"
            )
        slot, size_bytes = self._held.pop(group_id)
        self._held_bytes -= size_bytes
        return slot
