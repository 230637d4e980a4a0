"""What is planned: a cluster's shape, the rules, and how long everything takes."""

from __future__ import annotations

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
        publish_s: from the end of a step until an engine can exchange its weights.
        turn_s: of our own code for each turn, while neither engine nor environment works.
        episode_s: of our own code for each episode.
        report_s: an actor's reports are at least so far apart.
        handoff_s: between two learner steps when a batch is there.

    Raises:
        ValueError: if a time is negative.
    """

    engine: EngineTimes = field(default_factory=EngineTimes)
    learner: StepTimes = field(default_factory=StepTimes)
    publish_s: float = 0.0
    turn_s: float = 0.0
    episode_s: float = 0.0
    report_s: float = 0.01
    handoff_s: float = 0.0

    def __post_init__(self) -> None:
        times = (self.publish_s, self.turn_s, self.episode_s, self.report_s, self.handoff_s)
        if min(times) < 0:
            raise ValueError(f"times must be >= 0, got {times}")


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
        ValueError: if a number is too small.
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
        for name in ("num_engines", "groups_per_step", "group_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("max_staleness", "warmup_steps", "prompt_tokens", "observation_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


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

    def to_json(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return asdict(self)
