"""Does the staleness bound hold under heavy-tailed episodes, and what does each rule cost?

The real admission, replay buffer and ledger run on a virtual clock: the unit of time is one learner
step. Episodes have lognormal lengths; engines load new versions out of step with each other, and
the newest version replaces one that waits. The staleness of every trained token is computed here,
from the arrays that the learner would get.

Two rules that the package does not have show why it has the others: ``admission_only`` limits how
many groups are admitted and checks nothing when a batch is made; ``pace_no_lookahead`` waits only
for groups that would expire in the very next step.

    python benchmarks/staleness_bound.py --quick
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.staleness import StalenessCost, StalenessRule
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import (
    BYTES_PER_TOKEN,
    RECORD_OVERHEAD_BYTES,
    DropReason,
    SampledBatch,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)

RULES = ("mask", "drop", "pace", "admission_only", "pace_no_lookahead")


class Deadlock(Exception):
    """Nothing is under way, and no batch can be made."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run on the virtual clock; times in learner steps.

    Attributes:
        rule: one of ``RULES``.
        max_staleness: ``K``.
        groups_per_step: ``B``.
        group_size: trajectories per group; it ends with its longest.
        mean_steps: mean length of a trajectory.
        sigma: of the logarithm of the length.
        longest_steps: lengths are cut here, as an episode deadline would.
        tokens_per_step: sampled per trajectory and unit of time.
        publish_steps: mean time until one engine has loaded a version.
        num_engines: that load versions independently.
        trained_tokens: the run ends with the step that reaches this number.
        seed: of lengths and loads.
    """

    rule: str
    max_staleness: int
    groups_per_step: int = 16
    group_size: int = 1
    mean_steps: float = 4.0
    sigma: float = 1.0
    longest_steps: float = 400.0
    tokens_per_step: int = 4
    publish_steps: float = 0.25
    num_engines: int = 2
    trained_tokens: int = 100_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did; times in learner steps.

    Attributes:
        steps: finished learner steps.
        steps_time: virtual time that they took.
        trained_tokens: in their losses.
        tokens_over_bound: of these, older than ``K``.
        groups_over_bound_fraction: trained groups with such a token.
        staleness_mean: over trained tokens.
        staleness_max: over trained tokens.
        dropped_fraction: groups dropped as stale, of those that finished.
        lost_generation_fraction: generated tokens that never entered a loss for their age.
        masked_fraction: of the tokens in trained batches, those outside the loss for their age.
        lost_over_kept_length: mean length of lost trajectories over that of kept ones, or None.
        learner_busy_fraction: of the time.
    """

    steps: int
    steps_time: float
    trained_tokens: int
    tokens_over_bound: int
    groups_over_bound_fraction: float
    staleness_mean: float
    staleness_max: int
    dropped_fraction: float
    lost_generation_fraction: float
    masked_fraction: float
    lost_over_kept_length: float | None
    learner_busy_fraction: float


class Simulation:
    """Plays one scenario; :meth:`run` does everything."""

    def __init__(self, scenario: Scenario) -> None:
        self.s = s = scenario
        self._rng = np.random.default_rng(s.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._version = 0
        self._training = False
        self._staleness: Counter[int] = Counter()
        self._groups_over_bound = 0
        self._groups_trained = 0
        # Per engine: when it loaded which version, whether it is loading, and what waits.
        self._loaded = [([0.0], [0]) for _ in range(s.num_engines)]
        self._waiting: list[int | None] = [None] * s.num_engines
        self._loading = [False] * s.num_engines
        self._next_engine = 0
        tokens = 1 + math.ceil(s.longest_steps * s.tokens_per_step)
        largest = s.group_size * (RECORD_OVERHEAD_BYTES + BYTES_PER_TOKEN * tokens)
        slots = (s.max_staleness + 1) * s.groups_per_step
        self._ledger = GroupLedger(
            admission=Admission(
                groups_per_step=s.groups_per_step,
                max_staleness=s.max_staleness,
                largest_group_bytes=largest,
                capacity_bytes=(slots + 1) * largest,
            ),
            buffer=ReplayBuffer(groups_per_step=s.groups_per_step, rule=make_rule(s)),
        )
        for engine in range(s.num_engines):
            self._ledger.engine_joined(str(engine), 0)

    def run(self) -> Outcome:
        """Play until enough tokens are trained.

        Raises:
            Deadlock: if no event is left and no batch can be made.
        """
        self._go_on()
        while self._staleness.total() < self.s.trained_tokens:
            if not self._events:
                raise Deadlock(f"at version {self._version}: {self._ledger.counts()}")
            self._now, _, event = heapq.heappop(self._events)
            event()
            self._go_on()
        return self._outcome()

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._order), event))

    def _go_on(self) -> None:
        """Do everything that is possible now, in the order of the coordinator's loop."""
        while True:
            while (slot := self._ledger.try_admit()) is not None:
                self._start_group(slot.group_id)
            if self._training:
                return
            outcome = self._ledger.sample(self._version)
            if outcome.batch is not None:
                self._training = True
                self._at(1.0, lambda batch=outcome.batch: self._end_step(batch))
                return
            if not outcome.released:
                return

    def _start_group(self, group_id: int) -> None:
        s = self.s
        engine = self._next_engine
        self._next_engine = (engine + 1) % s.num_engines
        location = math.log(s.mean_steps) - s.sigma**2 / 2
        lengths = self._rng.lognormal(location, s.sigma, s.group_size).clip(max=s.longest_steps)
        started = self._now
        self._at(float(lengths.max()), lambda: self._end_group(group_id, engine, started, lengths))

    def _end_group(
        self, group_id: int, engine: int, started: float, lengths: np.ndarray[Any, Any]
    ) -> None:
        times, versions = self._loaded[engine]
        first = bisect_right(times, started) - 1
        swap_times, swap_versions = np.array(times[first:]), np.array(versions[first:])
        members = []
        for length in lengths:
            count = max(1, int(length * self.s.tokens_per_step))
            token_times = started + np.arange(count) / self.s.tokens_per_step
            swaps = np.searchsorted(swap_times, token_times, side="right") - 1
            members.append(make_trajectory(swap_versions[swaps]))
        group = TrajectoryGroup(group_id=group_id, task_id="task", trajectories=tuple(members))
        self._ledger.insert(group)

    def _end_step(self, batch: SampledBatch) -> None:
        self._count(batch)
        self._version += 1
        self._training = False
        self._ledger.commit(batch, self._version)
        for engine in range(self.s.num_engines):
            self._waiting[engine] = self._version
            self._publish(engine)

    def _publish(self, engine: int) -> None:
        version = self._waiting[engine]
        if self._loading[engine] or version is None:
            return
        self._waiting[engine] = None
        self._loading[engine] = True
        delay = self.s.publish_steps * self._rng.uniform(0.5, 1.5)
        self._at(delay, lambda: self._end_load(engine, version))

    def _end_load(self, engine: int, version: int) -> None:
        self._loading[engine] = False
        self._loaded[engine][0].append(self._now)
        self._loaded[engine][1].append(version)
        self._ledger.engine_loaded(str(engine), version)
        self._publish(engine)

    def _count(self, batch: SampledBatch) -> None:
        """Count trained tokens by staleness, from the arrays, at the version that there is."""
        for sampled in batch.groups:
            oldest = self._version
            for member in sampled.group.trajectories:
                versions = member.policy_versions[member.sampled]
                versions = versions[versions >= sampled.min_trainable_version]
                ages, counts = np.unique(self._version - versions, return_counts=True)
                self._staleness.update(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
                oldest = min(oldest, int(versions.min(initial=oldest)))
            self._groups_trained += 1
            self._groups_over_bound += self._version - oldest > self.s.max_staleness

    def _outcome(self) -> Outcome:
        cost: StalenessCost = self._ledger.take_cost()
        values = cost.metrics()
        trained = self._staleness.total()
        dropped = self._ledger.counts().dropped.get(DropReason.STALE, 0)
        ages = self._staleness.items()
        return Outcome(
            steps=self._version,
            steps_time=self._now,
            trained_tokens=trained,
            tokens_over_bound=sum(n for age, n in ages if age > self.s.max_staleness),
            groups_over_bound_fraction=self._groups_over_bound / self._groups_trained,
            staleness_mean=sum(age * n for age, n in ages) / trained,
            staleness_max=max(self._staleness),
            dropped_fraction=dropped / (dropped + self._groups_trained),
            lost_generation_fraction=values["lost_generation_fraction"],
            masked_fraction=values["masked_fraction"],
            lost_over_kept_length=values.get("lost_over_kept_length"),
            learner_busy_fraction=self._version / self._now,
        )


def make_rule(scenario: Scenario) -> StalenessRule:
    """Return the scenario's rule; a huge ``K`` or ``B`` switches a check off."""
    name, bound, batch = scenario.rule, scenario.max_staleness, scenario.groups_per_step
    if name == "admission_only":
        return StalenessRule(name="mask", max_staleness=sys.maxsize, groups_per_step=batch)
    if name == "pace_no_lookahead":
        return StalenessRule(name="pace", max_staleness=bound, groups_per_step=sys.maxsize)
    return StalenessRule(name=name, max_staleness=bound, groups_per_step=batch)


def make_trajectory(versions: np.ndarray[Any, Any]) -> Trajectory:
    """Return a trajectory of one prompt token and one sampled token for each version."""
    length = 1 + len(versions)
    return Trajectory(
        token_ids=np.zeros(length, np.int32),
        sampled=np.arange(length) > 0,
        behavior_logprobs=np.zeros(length, np.float32),
        policy_versions=np.concatenate([[-1], versions]),
        temperature=1.0,
        reward=0.0,
        status=TrajectoryStatus.TERMINATED,
        num_turns=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer values of K and fewer tokens")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    bounds = (0, 1, 2, 4, 8)
    tokens = 100_000 if args.quick else 400_000
    sizes = (1,) if args.quick else (1, 8)

    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    misses: list[str] = []
    print(
        "length: lost trajectories over kept ones; time: per learner step and per trained token, "
        "over that of mask\n"
        f"{'members':>7} {'K':>2} {'rule':<18}{'tokens':>9}{'over K':>8}{'groups over':>12}"
        f"{'max':>5}{'mean':>6}{'dropped':>9}{'lost':>8}{'masked':>8}{'length':>8}{'time/step':>10}{'/token':>7}"
    )
    for size, bound in itertools.product(sizes, bounds):
        mask: Outcome | None = None
        for rule in RULES:
            scenario = Scenario(
                rule=rule, max_staleness=bound, group_size=size, trained_tokens=tokens
            )
            row: dict[str, Any] = {"group_size": size, "max_staleness": bound, "rule": rule}
            try:
                outcome = Simulation(scenario).run()
            except Deadlock as error:
                rows.append({**row, "deadlock": str(error)})
                print(f"{size:>7} {bound:>2} {rule:<18} deadlock {error}")
                if rule in ("mask", "drop", "pace"):
                    misses.append(f"{rule} K={bound} group_size={size}: deadlock")
                continue
            mask = mask or outcome
            row |= {**asdict(outcome), **slowdowns(outcome, mask)}
            rows.append(row)
            print_row(row)
            misses += missed(row)
    result = {
        "benchmark": "staleness_bound",
        "commit": run_text("git", "rev-parse", "--short", "HEAD"),
        "hardware": f"{platform.machine()}, Python {platform.python_version()}, virtual clock",
        "seconds": round(time.perf_counter() - started, 1),
        "misses": misses,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def slowdowns(outcome: Outcome, mask: Outcome) -> dict[str, float]:
    """Return the time per learner step and per trained token, over those of ``mask``."""
    return {
        "step_slowdown": outcome.steps_time * mask.steps / (outcome.steps * mask.steps_time),
        "token_slowdown": (outcome.steps_time * mask.trained_tokens)
        / (outcome.trained_tokens * mask.steps_time),
    }


def missed(row: Mapping[str, Any]) -> list[str]:
    """Return the targets that a row misses: no rule may pass the bound, pace may drop nothing."""
    name = f"{row['rule']} K={row['max_staleness']} group_size={row['group_size']}"
    out = []
    if row["rule"] in ("mask", "drop", "pace") and row["tokens_over_bound"]:
        out.append(f"{name}: {row['tokens_over_bound']} tokens over the bound")
    if row["rule"] == "pace" and row["dropped_fraction"]:
        out.append(f"{name}: {row['dropped_fraction']:.2%} of the groups dropped")
    return out


def print_row(row: Mapping[str, Any]) -> None:
    ratio = row["lost_over_kept_length"]
    print(
        f"{row['group_size']:>7} {row['max_staleness']:>2} {row['rule']:<18}"
        f"{row['trained_tokens']:>9}{row['tokens_over_bound']:>8}"
        f"{row['groups_over_bound_fraction']:>12.2%}{row['staleness_max']:>5}"
        f"{row['staleness_mean']:>6.2f}{row['dropped_fraction']:>9.2%}"
        f"{row['lost_generation_fraction']:>8.1%}{row['masked_fraction']:>8.1%}"
        f"{'-' if ratio is None else f'{ratio:.2f}':>8}{row['step_slowdown']:>10.2f}"
        f"{row['token_slowdown']:>7.2f}"
    )


def run_text(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
