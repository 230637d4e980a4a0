"""A world around the ledger: engines, a learner and slow episodes, driven one event at a time.

It keeps its own book of what every group is and what every engine has, from the events alone, and
after every event compares the ledger with it. ``InvariantError`` names what was broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.ledger import GroupLedger, Outcome
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.replay.selectors import Selector, fifo, uniform
from skyrl_async.types import DroppedGroup, DropReason, SampledBatch, TrajectoryGroup
from tests.coordination.groups import (
    GROUP_SIZE,
    LARGEST_GROUP_BYTES,
    MAX_SAMPLED_TOKENS,
    make_group,
)


class InvariantError(AssertionError):
    """An invariant does not hold."""


def check(holds: object, invariant: str, *detail: object) -> None:
    if not holds:
        raise InvariantError(f"{invariant}: {' '.join(map(str, detail))}")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    rule: str = "mask"
    max_staleness: int = 2
    groups_per_step: int = 2
    max_times_sampled: int = 1
    selector: str = "fifo"
    num_engines: int = 2
    capacity_groups: int | None = None
    spare_bytes: int = 1 << 20  # of the byte limit, beyond groups_per_step x the largest group
    seed: int = 0


@dataclass(frozen=True)
class Parts:
    """The classes under test; seeded bugs put subclasses here."""

    rule: Callable[..., StalenessRule] = StalenessRule
    admission: Callable[..., Admission] = Admission
    buffer: Callable[..., ReplayBuffer] = ReplayBuffer
    ledger: Callable[..., GroupLedger] = GroupLedger


@dataclass
class Group:
    """What the world knows of one group."""

    born_version: int
    members: list[list[int]] = field(default_factory=lambda: [[] for _ in range(GROUP_SIZE)])
    state: str = "in_flight"
    reason: DropReason | None = None
    uses: int = 0
    made_version: int | None = None
    record: TrajectoryGroup | None = None
    was_released: bool = False

    def versions(self) -> list[int]:
        return [v for member in self.members for v in member]


class World:
    def __init__(self, config: WorldConfig, parts: Parts | None = None) -> None:
        self.config = config
        self.parts = parts or Parts()
        self.version = 0
        self.newest_weights = 0  # published; one ahead while a step's end is not yet known here
        self.live_version = 0
        self.engines: dict[str, int] = {}
        self.groups: dict[int, Group] = {}
        self.training: SampledBatch | None = None
        self.prefetched: SampledBatch | None = None
        self.trained: Counter[int] = Counter()  # trained tokens by staleness
        self.steps = 0
        self.next_engine = 0
        self.ledger = self._assemble(state=None)
        for _ in range(config.num_engines):
            self.join_engine(0)

    def _assemble(self, state) -> GroupLedger:
        c = self.config
        common = {
            "groups_per_step": c.groups_per_step,
            "max_times_sampled": c.max_times_sampled,
        }
        self.rule = self.parts.rule(
            name=c.rule, max_staleness=c.max_staleness, groups_per_step=c.groups_per_step
        )
        selector: Selector = fifo if c.selector == "fifo" else uniform(c.seed)
        self.capacity_bytes = c.groups_per_step * LARGEST_GROUP_BYTES + max(1, c.spare_bytes)
        self.admission = self.parts.admission(
            **common,
            max_staleness=c.max_staleness,
            largest_group_bytes=LARGEST_GROUP_BYTES,
            capacity_bytes=self.capacity_bytes,
            capacity_groups=c.capacity_groups,
            live_version=self.live_version,
        )
        buffer = self.parts.buffer(**common, rule=self.rule, selector=selector)
        return self.parts.ledger(admission=self.admission, buffer=buffer, state=state)

    def ids(self, state: str) -> list[int]:
        return [id_ for id_, group in self.groups.items() if group.state == state]

    # Events. Each one does nothing where it cannot happen.

    def admit(self) -> bool:
        slot = self.ledger.try_admit()
        if slot is None:
            return False
        check(slot.group_id not in self.groups, "states", f"{slot} admitted twice")
        check(slot.born_version == self.live_version, "live", f"{slot}, {self.live_version}")
        self.groups[slot.group_id] = Group(slot.born_version)
        return True

    def generate(self, group_id: int, engine: str, num_tokens: int) -> None:
        """Every member samples up to ``num_tokens`` with the version that the engine has now."""
        for member in self.groups[group_id].members:
            room = MAX_SAMPLED_TOKENS - len(member)
            member += [self.engines[engine]] * min(num_tokens, room)

    def finish(self, group_id: int, failed_members: int = 0) -> None:
        """The group ends; members without tokens, and some others, have failed."""
        group = self.groups[group_id]
        members = [member for member in group.members if member]
        members = members[: max(0, len(members) - failed_members)]
        if not members:
            self.fail(group_id, DropReason.TOO_FEW_MEMBERS)
            return
        failures = (DropReason.ENVIRONMENT_ERROR,) * (GROUP_SIZE - len(members))
        group.members = members
        group.record = make_group(group_id, members, failures)
        group.state = "buffered"
        self.ledger.insert(group.record)

    def fail(self, group_id: int, reason: DropReason = DropReason.EPISODE_TIMEOUT) -> None:
        group = self.groups[group_id]
        group.state, group.reason = "dropped", reason
        outcome = self.ledger.drop(DroppedGroup(group_id=group_id, reason=reason))
        self._take(outcome)
        check(group.was_released, "slots", f"group {group_id} failed and keeps its slot")

    def load(self, engine: str, version: int) -> None:
        self.engines[engine] = max(self.engines[engine], min(version, self.newest_weights))
        self._update_live()
        self._take(self.ledger.engine_loaded(engine, self.engines[engine]))

    def join_engine(self, version: int) -> None:
        engine = f"engine-{self.next_engine}"
        self.next_engine += 1
        self.engines[engine] = max(self.live_version, min(version, self.newest_weights))
        self._update_live()
        self._take(self.ledger.engine_joined(engine, self.engines[engine]))

    def leave_engine(self, engine: str) -> None:
        del self.engines[engine]
        self._update_live()
        self._take(self.ledger.engine_left(engine))

    def prefetch(self, guess: int) -> None:
        """Fetch ahead for the version that there is, or for the one that the running step makes."""
        if self.prefetched is None:
            early = self.newest_weights > self.version
            guess = max(guess, early) if self.training else 0
            outcome = self.ledger.sample(self.version + guess)
            self._take(outcome, at_version=self.version + guess)
            self.prefetched = outcome.batch
            self._lease(outcome.batch)

    def give_back(self) -> None:
        if self.prefetched is not None:
            self._unlease(self.prefetched)
            self.ledger.give_back(self.prefetched)
            self.prefetched = None

    def start_step(self) -> bool:
        if self.training is not None:
            return False
        if self.prefetched is not None:
            self._unlease(self.prefetched)
            outcome = self.ledger.recheck(self.prefetched, self.version)
            self.prefetched = None
        else:
            outcome = self.ledger.sample(self.version)
        self._take(outcome, at_version=self.version)
        if outcome.batch is None:
            return False
        self._lease(outcome.batch)
        self.training = outcome.batch
        self._check_batch(outcome.batch)
        return True

    def publish_early(self) -> None:
        """The learner publishes what the step made before the coordinator hears of its end."""
        if self.training is not None:
            self.newest_weights = self.version + 1

    def end_step(self, *, finite: bool) -> None:
        if self.training is None:
            return
        finite = finite or self.newest_weights > self.version
        batch, self.training = self.training, None
        for sampled in batch.groups:
            group = self.groups[sampled.group.group_id]
            if not finite:
                group.state, group.reason = "dropped", DropReason.NONFINITE_UPDATE
                continue
            group.uses += 1
            group.made_version = self.version + 1
            again = group.uses < self.config.max_times_sampled
            group.state = "buffered" if again else "consumed"
        if finite:
            self.version += 1
            self.newest_weights = self.version
            self.steps += 1
            self._count_tokens(batch)
            self._take(self.ledger.commit(batch, self.version))
        else:
            self._take(self.ledger.skip(batch))

    def resume(self) -> None:
        """The run is killed and resumed from a checkpoint of this moment."""
        if self.newest_weights > self.version:
            self.end_step(finite=True)
        state = self.ledger.state()
        self.training = self.prefetched = None
        for group in self.groups.values():
            if group.state == "leased":
                group.state = "buffered"
            elif group.state == "in_flight":
                group.state, group.was_released = "lost", True
            elif group.state != "buffered":
                group.was_released = True
        self.engines = {}
        self.live_version = self.version
        self.ledger = self._assemble(state)
        for _ in range(self.config.num_engines):
            self.join_engine(self.version)

    def drain(self) -> None:
        """From here, finishing what runs, publishing and stepping must always lead to a step."""
        self.end_step(finite=True)
        for _ in range(2):
            self._drain_one_step()

    def _drain_one_step(self) -> None:
        for _ in range(3):
            if not self.engines:
                self.join_engine(self.version)
            for engine in list(self.engines):
                self.load(engine, self.version)
            while self.admit():
                pass
            for group_id in self.ids("in_flight"):
                self.generate(group_id, next(iter(self.engines)), 1)
                self.finish(group_id)
            self.check()
            if self.start_step():
                self.end_step(finite=True)
                self.check()
                return
        check(False, "deadlock", f"at version {self.version}: {self.ledger.counts()}")

    # The book.

    def _update_live(self) -> None:
        self.live_version = min(self.engines.values(), default=self.live_version)

    def _lease(self, batch: SampledBatch | None) -> None:
        for sampled in batch.groups if batch else ():
            group = self.groups[sampled.group.group_id]
            check(group.state == "buffered", "states", f"leased a group that is {group.state}")
            check(sampled.group is group.record, "states", "another group under this id")
            group.state = "leased"

    def _unlease(self, batch: SampledBatch) -> None:
        for sampled in batch.groups:
            self.groups[sampled.group.group_id].state = "buffered"

    def _take(self, outcome: Outcome, at_version: int = 0) -> None:
        for departed in outcome.departed:
            group_id = departed.stored.group.group_id
            group = self.groups[group_id]
            if departed.fate == "consumed" or departed.reason is DropReason.NONFINITE_UPDATE:
                check(group.state == departed.fate, "states", f"{group_id} is {group.state}")
                continue
            check(group.state == "buffered", "states", f"{group_id} left while {group.state}")
            decisive = max if self.config.rule == "mask" else min
            version = decisive(group.versions())
            too_old = at_version - version > self.config.max_staleness
            check(too_old, "waste", f"group {group_id} was trainable and left")
            expected = "retired" if group.uses else "dropped"
            check(departed.fate == expected, "fate", f"{departed.fate} after {group.uses} uses")
            group.state, group.reason = departed.fate, departed.reason
        for released in outcome.released:
            group = self.groups[released.slot.group_id]
            check(not group.was_released, "slots", f"{released} released twice")
            group.was_released = True
            expected = group.reason if group.state == "dropped" else "live"
            check(released.reason == expected, "slots", f"{released}, but {group.state}")

    def _check_batch(self, batch: SampledBatch) -> None:
        """The batch, as it is about to be trained from the version that there is now."""
        bound = self.config.max_staleness
        ids = {sampled.group.group_id for sampled in batch.groups}
        full = len(ids) == len(batch.groups) == self.config.groups_per_step
        check(full, "full batch", sorted(ids))
        for sampled in batch.groups:
            versions = self.groups[sampled.group.group_id].versions()
            trained = [v for v in versions if v >= sampled.min_trainable_version]
            check(trained, "loss tokens", f"group {sampled.group.group_id} has none")
            check(self.version - min(trained) <= bound, "bound", trained, "at", self.version)
            in_bound = [v for v in versions if self.version - v <= bound]
            check(trained == in_bound, "cut-off", trained, "instead of", in_bound)
            whole = self.config.rule == "mask" or trained == versions
            check(whole, "bound", versions, "at", self.version)

    def _count_tokens(self, batch: SampledBatch) -> None:
        for sampled in batch.groups:
            for version in self.groups[sampled.group.group_id].versions():
                if version >= sampled.min_trainable_version:
                    self.trained[self.version - 1 - version] += 1

    def check(self) -> None:
        """Compare the ledger with the book."""
        c = self.config
        states = Counter(group.state for group in self.groups.values())
        counts = self.ledger.counts()
        for state in ("in_flight", "buffered", "leased", "consumed", "retired"):
            check(getattr(counts, state) == states[state], "states", state, counts, states)
        reasons = Counter(g.reason for g in self.groups.values() if g.state == "dropped")
        check(dict(counts.dropped) == dict(reasons), "states", counts.dropped, reasons)
        if c.rule == "pace":
            check(not reasons[DropReason.STALE], "pace", "a group went stale")
        check(self.ledger.live_version == self.live_version, "live", self.ledger.live_version)

        inside = [g for g in self.groups.values() if g.state in ("buffered", "leased")]
        size_bytes = sum(g.record.size_bytes for g in inside)
        check(self.ledger.size_bytes == size_bytes, "bytes", self.ledger.size_bytes, size_bytes)
        check(size_bytes <= self.capacity_bytes, "capacity", size_bytes, "bytes")
        worst = size_bytes + states["in_flight"] * LARGEST_GROUP_BYTES
        check(worst <= self.capacity_bytes, "capacity", worst, "bytes with reservations")
        if c.capacity_groups is not None:
            used = len(inside) + states["in_flight"]
            check(used <= c.capacity_groups, "capacity", used, "groups")

        expected = {id_ for id_, group in self.groups.items() if self._has_slot(group)}
        actual = self.admission.group_ids()
        check(actual == expected, "slots", "leaked", actual - expected, "lost", expected - actual)
        not_released = {id_ for id_, group in self.groups.items() if not group.was_released}
        check(not_released == expected, "slots", "not said", not_released ^ expected)
        limit = max(
            c.groups_per_step,
            int((c.max_staleness + 1) * c.groups_per_step / c.max_times_sampled),
        )
        check(len(expected) <= limit, "slots", len(expected), "of", limit)
        check(self.ledger.num_slots == len(expected), "slots", self.ledger.num_slots)

    def _has_slot(self, group: Group) -> bool:
        if group.state in ("consumed", "retired"):
            return group.made_version > self.live_version
        return group.state in ("in_flight", "buffered", "leased")
