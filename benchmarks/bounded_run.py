"""One run at the staleness bound, on the virtual clock of the planner's simulation.

The unit of time is one learner step, in which a trajectory gets four tokens. Episodes have
lognormal lengths, a group ends with its longest; engines load new versions out of step with each
other, and the newest version replaces one that waits. The staleness of every trained token is
computed here, from the arrays that the learner would get.

Two rules that the package does not have show why it has the others: ``admission_only`` limits how
many groups are admitted and checks nothing when a batch is made; ``pace_no_lookahead`` waits only
for groups that would expire in the very next step.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.plan.episodes import DrawnEpisodes
from skyrl_async.plan.scenario import Costs, Forecast, Scenario
from skyrl_async.plan.simulation import Simulation
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.types import SampledBatch

RULES = ("mask", "drop", "pace", "admission_only", "pace_no_lookahead")

GROUPS_PER_STEP = 16
NUM_ENGINES = 2
TOKENS_PER_STEP = 4
LENGTHS = "lognormal:16,1.0,1536"
"""Tokens of a trajectory: 4 learner steps on average, cut as an episode deadline would cut them."""
COSTS = Costs(
    engine=EngineTimes(decode_step_s=1 / TOKENS_PER_STEP, max_concurrent=sys.maxsize),
    learner=StepTimes(step_s=1.0),
    publish_s=0.25,
    publish_spread=0.5,
    report_s=0.0,
)


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


class TrainedTokens:
    """Counts trained tokens by staleness, from the arrays.

    Args:
        max_staleness: ``K``.
    """

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._by_staleness: Counter[int] = Counter()
        self._steps = self._groups = self._groups_over_bound = 0

    def count(self, batch: SampledBatch) -> None:
        """Add those of one step."""
        for sampled in batch.groups:
            oldest = batch.train_version
            for trajectory in sampled.trajectories:
                versions = trajectory.policy_versions[trajectory.sampled]
                versions = versions[versions >= sampled.min_trainable_version]
                ages, counts = np.unique(batch.train_version - versions, return_counts=True)
                self._by_staleness.update(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
                oldest = min(oldest, int(versions.min(initial=oldest)))
            self._groups += 1
            self._groups_over_bound += batch.train_version - oldest > self._max_staleness
        self._steps += 1

    def outcome(self, forecast: Forecast) -> Outcome:
        """Return what the run did whose batches were counted."""
        ages = self._by_staleness.items()
        total = self._by_staleness.total()
        return Outcome(
            steps=self._steps,
            steps_time=forecast.seconds,
            trained_tokens=total,
            tokens_over_bound=sum(n for age, n in ages if age > self._max_staleness),
            groups_over_bound_fraction=self._groups_over_bound / self._groups,
            staleness_mean=sum(age * n for age, n in ages) / total,
            staleness_max=max(self._by_staleness),
            dropped_fraction=forecast.dropped_fraction,
            lost_generation_fraction=forecast.lost_generation_fraction,
            masked_fraction=forecast.masked_fraction,
            lost_over_kept_length=forecast.lost_over_kept_length,
            learner_busy_fraction=1 - forecast.learner_idle_fraction,
        )


def play(
    rule: str, *, max_staleness: int, steps: int, group_size: int = 1, seed: int = 0
) -> Outcome:
    """Play one run.

    Args:
        rule: one of ``RULES``.
        max_staleness: ``K``.
        steps: of the learner.
        group_size: trajectories per group.
        seed: of the lengths.

    Raises:
        Stuck: if nothing is under way any more and no batch can be made.
    """
    scenario = Scenario(
        num_engines=NUM_ENGINES,
        groups_per_step=GROUPS_PER_STEP,
        group_size=group_size,
        max_staleness=max_staleness,
        prompt_tokens=1,
        costs=COSTS,
        steps=steps,
        warmup_steps=0,
    )
    trained = TrainedTokens(max_staleness)
    simulation = Simulation(
        scenario,
        DrawnEpisodes(reply_tokens=LENGTHS, seed=seed),
        rule=make_rule(rule, max_staleness),
        on_batch=trained.count,
    )
    if simulation.tokens_per_entry != 1:
        raise RuntimeError("tokens cannot be counted one by one: the episodes are too long")
    return trained.outcome(simulation.run())


def make_rule(name: str, max_staleness: int) -> StalenessRule:
    """Return the rule of a name; a huge ``K`` or ``B`` switches a check off."""
    if name == "admission_only":
        return StalenessRule(
            name="mask", max_staleness=sys.maxsize, groups_per_step=GROUPS_PER_STEP
        )
    if name == "pace_no_lookahead":
        return StalenessRule(name="pace", max_staleness=max_staleness, groups_per_step=sys.maxsize)
    known: Any = name
    return StalenessRule(name=known, max_staleness=max_staleness, groups_per_step=GROUPS_PER_STEP)
