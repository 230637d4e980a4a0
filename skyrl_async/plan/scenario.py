"""What is planned: a cluster's shape, the rules, and how long everything takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from skyrl_async.coordination.staleness import RuleName
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How long everything but the environments takes.

    Attributes:
        engine: of each engine.
        learner: of the learner group.
        publish_s: from the end of a step until an engine can exchange its weights, on average.
        publish_spread: each engine gets each version up to this part earlier or later; 0 for all at
            once.
        turn_s: of our own code for each turn, while neither engine nor environment works.
        episode_s: of our own code for each episode.
        report_s: an actor's reports are at least so far apart.
        handoff_s: between two learner steps when a batch is there.

    Raises:
        ValueError: if a time is negative or not finite, or the spread not in 0..1.
    """

    engine: EngineTimes = field(default_factory=EngineTimes)
    learner: StepTimes = field(default_factory=StepTimes)
    publish_s: float = 0.0
    publish_spread: float = 0.0
    turn_s: float = 0.0
    episode_s: float = 0.0
    report_s: float = 0.01
    handoff_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("publish_s", "turn_s", "episode_s", "report_s", "handoff_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"times must be finite and >= 0, got {value} for {name}")
        if not 0 <= self.publish_spread <= 1:
            raise ValueError(f"publish_spread must be in 0..1, got {self.publish_spread}")


_LEAST = {
    **dict.fromkeys(("num_engines", "groups_per_step", "group_size", "steps"), 1),
    **dict.fromkeys(("max_times_sampled", "max_groups_per_engine"), 1),
    **dict.fromkeys(("max_staleness", "warmup_steps"), 0),
    **dict.fromkeys(("prompt_tokens", "observation_tokens"), 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run to simulate.

    Attributes:
        num_engines: each with the costs of one.
        groups_per_step: ``B``.
        group_size: trajectories of a group, which all play on one engine's actor.
        max_staleness: ``K``.
        rule: at the bound.
        max_times_sampled: learner steps that may use one group.
        max_groups_per_engine: groups that an engine's actor plays at once.
        prompt_tokens: of an episode's first prompt.
        observation_tokens: between two replies.
        costs: of everything.
        steps: that are measured.
        warmup_steps: before them.
        max_events: the simulation gives up beyond.

    Raises:
        ValueError: if a number is too small or not finite, or ``pace`` is to use groups twice.
    """

    num_engines: int = 1
    groups_per_step: int = 16
    group_size: int = 16
    max_staleness: int = 1
    rule: RuleName = "mask"
    max_times_sampled: int = 1
    max_groups_per_engine: int = 1024
    prompt_tokens: float = 8
    observation_tokens: float = 4
    costs: Costs = field(default_factory=Costs)
    steps: int = 60
    warmup_steps: int = 10
    max_events: int = 20_000_000

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be >= {least} and finite, got {value}")
        if self.rule == "pace" and self.max_times_sampled > 1:
            raise ValueError(
                f"rule pace uses every group once, but max_times_sampled is "
                f"{self.max_times_sampled}; make that 1, or take the rule mask or drop"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a simulated run did, after its warm-up.

    Attributes:
        seconds: of the run's time that were simulated.
        steps_per_s: learner steps.
        tokens_per_s: generated.
        trained_tokens_per_s: in a loss.
        trajectories_per_s: trained, those without a loss token left out.
        learner_idle_fraction: of the learner's time.
        engine_idle_fraction: of the engines' time, without a sequence to decode.
        staleness_mean: over trained tokens.
        staleness_max: likewise.
        staleness_fractions: of the trained tokens, by staleness.
        dropped_fraction: groups dropped as stale, of those that left the buffer.
        masked_fraction: of the tokens in batches, those too old for the loss.
        lost_generation_fraction: of the generated tokens, those that never enter a loss for their
            age.
        lost_over_kept_length: mean length of trajectories without a loss token over that of the
            others; None unless there are both.
    """

    seconds: float
    steps_per_s: float
    tokens_per_s: float
    trained_tokens_per_s: float
    trajectories_per_s: float
    learner_idle_fraction: float
    engine_idle_fraction: float
    staleness_mean: float
    staleness_max: int
    staleness_fractions: Mapping[int, float]
    dropped_fraction: float
    masked_fraction: float
    lost_generation_fraction: float = 0.0
    lost_over_kept_length: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return asdict(self)
