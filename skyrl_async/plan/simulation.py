"""A run on a virtual clock: the real admission, buffer and staleness rule, with given durations.

The unit of detail is a reply: each one is submitted to a
:class:`skyrl_async.simulate.virtual_engine.VirtualEngine`, followed by its wait, and so on. Groups
pass through the :class:`skyrl_async.coordination.ledger.GroupLedger` that the coordinator uses, in
the order in which its loops would call it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.staleness import StalenessRule, max_admitted
from skyrl_async.plan.episodes import Episode, Episodes
from skyrl_async.plan.publishing import VirtualPublisher
from skyrl_async.plan.scenario import Forecast, Scenario
from skyrl_async.plan.tally import Tally
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.simulate.virtual_engine import Finished, VirtualEngine
from skyrl_async.types import (
    BYTES_PER_TOKEN,
    RECORD_OVERHEAD_BYTES,
    SampledBatch,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)

_ENTRIES_PER_TRAJECTORY = 24
_MAX_ENTRIES = 64 * _ENTRIES_PER_TRAJECTORY


class Stuck(RuntimeError):
    """Nothing is under way and no batch can be made, or the run has become too long."""


@dataclass(slots=True, eq=False)
class _Group:
    group_id: int
    engine: int
    left: int
    members: list[Trajectory] = field(default_factory=list)
    num_tokens: float = 0.0


@dataclass(slots=True, eq=False)
class _Member:
    group: _Group
    episode: Episode
    turn: int = 0
    context: float = 0.0
    computed: float = 0.0
    computed_version: int = -1
    segments: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Engine:
    virtual: VirtualEngine
    groups: int = 0
    wakes_s: float = float("inf")
    last_report_s: float = -float("inf")
    finished: list[TrajectoryGroup] = field(default_factory=list)
    reports: bool = False


class Simulation:
    """Plays one scenario; :meth:`run` does everything.

    Args:
        scenario: what.
        episodes: where its episodes come from.
        rule: that the replay buffer applies in place of the scenario's; admission follows the
            scenario all the same.
        on_batch: called with the batch of each step, when it ends.

    Attributes:
        tokens_per_entry: tokens that one entry of a trajectory's arrays stands for.
    """

    def __init__(
        self,
        scenario: Scenario,
        episodes: Episodes,
        *,
        rule: StalenessRule | None = None,
        on_batch: Callable[[SampledBatch], None] = lambda _: None,
    ) -> None:
        self._s = scenario
        self._rule = rule or StalenessRule(
            name=scenario.rule,
            max_staleness=scenario.max_staleness,
            groups_per_step=scenario.groups_per_step,
        )
        self._on_batch = on_batch
        self._episodes = episodes
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._version = 0
        self._training_since_s: float | None = None
        self._group_tokens: dict[int, float] = {}
        # Arrays hold one entry for so many tokens, so that long episodes cost no more than short.
        self.tokens_per_entry = max(1.0, episodes.mean_tokens / _ENTRIES_PER_TRAJECTORY)
        self._engines = [
            _Engine(VirtualEngine(scenario.costs.engine)) for _ in range(scenario.num_engines)
        ]
        self._least_busy = [(0, index) for index in range(scenario.num_engines)]
        self._publisher = VirtualPublisher(
            num_engines=scenario.num_engines,
            publish_s=scenario.costs.publish_s,
            spread=scenario.costs.publish_spread,
            stall_s=scenario.costs.engine.swap_stall_s,
            after=self._after,
            load=self._load,
        )
        self._ledger = _make_ledger(scenario, self._rule)
        for index in range(scenario.num_engines):
            self._ledger.engine_joined(str(index), 0)
        self._tally = Tally(max_staleness=self._rule.max_staleness)

    def run(self) -> Forecast:
        """Play until all steps are done.

        Raises:
            Stuck: if no event is left and no batch can be made, or there are too many events.
        """
        warm, last = self._s.warmup_steps, self._s.warmup_steps + self._s.steps
        self._go_on()
        started_s, num_events = (0.0 if not warm else None), 0
        while self._version < last:
            if not self._events or num_events > self._s.max_events:
                raise Stuck(self._why_stuck(num_events, last))
            self._now, _, event = heapq.heappop(self._events)
            num_events += 1
            event()
            if started_s is None and self._version == warm:
                started_s = self._now
                self._settle_engines()
                self._ledger.take_cost()
                self._tally = Tally(max_staleness=self._rule.max_staleness)
        self._settle_engines()
        assert started_s is not None, "the warm-up comes before the last step"
        return self._tally.forecast(
            seconds=self._now - started_s,
            num_engines=self._s.num_engines,
            cost=self._ledger.take_cost(),
        )

    def _why_stuck(self, num_events: int, last: int) -> str:
        counts = self._ledger.counts()
        where = (
            f"after {num_events} events at version {self._version} of {last}, with "
            f"{counts.in_flight} groups in flight and {counts.buffered} buffered"
        )
        if self._events:
            return (
                f"{where}: the limit is {self._s.max_events} events; lower steps, or the size of "
                "the scenario"
            )
        return f"{where}: nothing is under way, and no batch of {self._s.groups_per_step} is there"

    def _after(self, delay_s: float, event: Callable[[], None]) -> None:
        self._at(self._now + delay_s, event)

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time_s, self._now), next(self._order), event))

    def _go_on(self) -> None:
        """Do everything that is possible now, in the order of the coordinator's loops."""
        while True:
            self._admit()
            if self._training_since_s is not None:
                return
            outcome = self._ledger.sample(self._version)
            for departed in outcome.departed:
                self._group_tokens.pop(departed.stored.group.group_id, None)
                self._tally.dropped += 1
            if outcome.batch is not None:
                self._start_step(outcome.batch)
                return
            if not outcome.released:
                return

    def _admit(self) -> None:
        s = self._s
        while True:
            groups, index = self._least_busy[0]
            if groups != self._engines[index].groups:  # an entry from before
                heapq.heapreplace(self._least_busy, (self._engines[index].groups, index))
                continue
            if groups >= s.max_groups_per_engine:
                return
            slot = self._ledger.try_admit()
            if slot is None:
                return
            self._engines[index].groups += 1
            group = _Group(slot.group_id, index, s.group_size)
            for _ in range(s.group_size):
                member = _Member(group, self._episodes.draw(), context=s.prompt_tokens)
                delay_s = s.costs.episode_s + member.episode.first_wait_s
                self._after(delay_s, lambda member=member: self._submit(member))  # type: ignore[misc]

    def _submit(self, member: _Member) -> None:
        """Give an engine the next reply to generate."""
        engine = self._engines[member.group.engine]
        keeps = not self._s.costs.engine.recomputes_kv
        if keeps or member.computed_version == engine.virtual.policy_version:
            known = member.computed
        else:
            known = 0.0
        done = engine.virtual.submit(
            member,
            num_tokens=member.episode.reply_tokens[member.turn],
            context_tokens=round(member.context),
            new_tokens=max(0, round(member.context - known)),
            time_s=self._now,
        )
        self._generated(engine, done)

    def _generated(self, engine: _Engine, done: list[Finished]) -> None:
        """Let the environments answer what is done, and wake up for what is done next."""
        for finished in done:
            member = finished.key
            assert isinstance(member, _Member), "keys are members"
            member.segments += finished.segments
            member.context += member.episode.reply_tokens[member.turn]
            member.computed, member.computed_version = (
                member.context,
                engine.virtual.policy_version,
            )
            wait_s = member.episode.waits_s[member.turn] + self._s.costs.turn_s
            self._at(finished.time_s + wait_s, lambda member=member: self._answered(member))  # type: ignore[misc]
        next_s = engine.virtual.next_finish_s()
        if next_s is not None and next_s < engine.wakes_s:
            engine.wakes_s = next_s
            self._at(next_s, lambda: self._wake(engine))

    def _wake(self, engine: _Engine) -> None:
        if self._now >= engine.wakes_s:
            engine.wakes_s = float("inf")
            self._generated(engine, engine.virtual.advance(self._now))

    def _answered(self, member: _Member) -> None:
        member.turn += 1
        if member.turn < len(member.episode.reply_tokens):
            member.context += self._s.observation_tokens
            self._submit(member)
            return
        group = member.group
        group.members.append(self._trajectory(member))
        group.num_tokens += member.context
        group.left -= 1
        if not group.left:
            self._group_tokens[group.group_id] = group.num_tokens
            engine = self._engines[group.engine]
            engine.finished.append(
                TrajectoryGroup(
                    group_id=group.group_id, task_id="task", trajectories=tuple(group.members)
                )
            )
            self._report_soon(group.engine)

    def _report_soon(self, index: int) -> None:
        engine = self._engines[index]
        if engine.reports:
            return
        engine.reports = True
        self._at(
            max(self._now, engine.last_report_s + self._s.costs.report_s),
            lambda: self._report(index),
        )

    def _report(self, index: int) -> None:
        """Take what an actor has: finished groups, and the version that its engine has."""
        engine = self._engines[index]
        engine.reports, engine.last_report_s = False, self._now
        self._ledger.engine_loaded(str(index), engine.virtual.policy_version)
        finished, engine.finished = engine.finished, []
        for group in finished:
            engine.groups -= 1
            heapq.heappush(self._least_busy, (engine.groups, index))
            self._ledger.insert(group)
        self._go_on()

    def _start_step(self, batch: SampledBatch) -> None:
        tokens = sum(self._group_tokens.get(g.group.group_id, 0.0) for g in batch.groups)
        self._training_since_s = self._now
        seconds = self._s.costs.learner.seconds(tokens)
        self._after(seconds, lambda: self._end_step(batch, seconds))

    def _end_step(self, batch: SampledBatch, seconds: float) -> None:
        self._on_batch(batch)
        self._tally.step(batch, busy_s=seconds, tokens_per_entry=self.tokens_per_entry)
        self._version += 1
        outcome = self._ledger.commit(batch, self._version)
        for departed in outcome.departed:
            self._group_tokens.pop(departed.stored.group.group_id, None)
        self._publisher.publish(self._version)
        self._admit()
        self._after(self._s.costs.handoff_s, self._free_learner)

    def _free_learner(self) -> None:
        self._training_since_s = None
        self._go_on()

    def _load(self, index: int, version: int) -> None:
        engine = self._engines[index]
        self._generated(engine, engine.virtual.swap(version, time_s=self._now))
        self._report_soon(index)

    def _trajectory(self, member: _Member) -> Trajectory:
        """Return what the ledger and the buffer need: policy versions, in proportion."""
        counts: Counter[int] = Counter()
        for version, count in member.segments:
            counts[version] += count
        order = sorted(counts)
        entries = [max(1, round(counts[v] / self.tokens_per_entry)) for v in order]
        entries = [min(e, _MAX_ENTRIES) for e in entries]
        length = 1 + sum(entries)
        versions = np.empty(length, np.int32)
        versions[0] = -1
        versions[1:] = np.repeat(np.array(order, np.int32), entries)
        return Trajectory(
            token_ids=np.zeros(length, np.int32),
            sampled=versions >= 0,
            behavior_logprobs=np.zeros(length, np.float32),
            policy_versions=versions,
            temperature=1.0,
            reward=0.0,
            status=TrajectoryStatus.TERMINATED,
            num_turns=len(member.episode.reply_tokens),
        )

    def _settle_engines(self) -> None:
        for engine in self._engines:
            self._generated(engine, engine.virtual.advance(self._now))
            self._tally.engine(engine.virtual.take_totals())


def _make_ledger(scenario: Scenario, rule: StalenessRule) -> GroupLedger:
    s = scenario
    entries = 1 + 64 * _MAX_ENTRIES
    largest = s.group_size * (RECORD_OVERHEAD_BYTES + BYTES_PER_TOKEN * entries)
    slots = max_admitted(
        groups_per_step=s.groups_per_step,
        max_staleness=s.max_staleness,
        max_times_sampled=s.max_times_sampled,
    )
    return GroupLedger(
        admission=Admission(
            groups_per_step=s.groups_per_step,
            max_staleness=s.max_staleness,
            max_times_sampled=s.max_times_sampled,
            largest_group_bytes=largest,
            capacity_bytes=(slots + 1) * largest,
        ),
        buffer=ReplayBuffer(
            groups_per_step=s.groups_per_step,
            rule=rule,
            max_times_sampled=s.max_times_sampled,
        ),
        rule=rule,
    )
