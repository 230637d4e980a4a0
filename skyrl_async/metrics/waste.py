"""The largest waste of a run in words, with the configuration key that changes it.

The learner and the engines are what a run pays for, so theirs is the time that can be wasted; the
slots of the actors cost next to nothing, but what they wait for is mostly the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

Fractions = Mapping[str, Mapping[str, float]]
"""Role -> part -> share of the role's wall time."""

_WORK = {"learner": ("train",), "engine": ("generate",)}
"""What each role is there for."""

_NEGLIGIBLE = 0.05

_FILTERS = {
    "zero_variance": "filters.zero_variance",
    "pass_rate": "filters.max_pass_rate",
    "truncated": "filters.max_truncated_fraction",
}
"""Reason of a drop -> the key that makes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WasteFacts:
    """What the advice depends on, from the configuration.

    Attributes:
        engine_kind: ``engine.kind``; each rollout actor has an engine of its own if ``embedded``.
        staleness_max: ``staleness.max``.
        kv_after_swap: ``engine.kv_after_swap``.
        dropped: groups of the run, by reason.
        groups_used: groups that were trained.
    """

    engine_kind: str
    staleness_max: int
    kv_after_swap: str = "recompute"
    dropped: Mapping[str, int] = field(default_factory=dict)
    groups_used: int = 0

    @property
    def main_filter(self) -> tuple[str, str] | None:
        """Name and key of the filter that rejects most groups, if filters reject most of all."""
        rejected = {name: self.dropped.get(name, 0) for name in _FILTERS}
        if sum(rejected.values()) <= self.groups_used:
            return None
        name = max(rejected, key=lambda name: rejected[name])
        return name, _FILTERS[name]

    @property
    def more_engines(self) -> str:
        """The key that gives a run more engines."""
        embedded = self.engine_kind == "embedded"
        return "rollout.num_actors" if embedded else "engine.num_engines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """One part of one role's time that did not go into its work.

    Attributes:
        role: ``learner`` or ``engine``.
        part: of its time.
        fraction: share of its wall time.
        text: what it is, why, and what changes it.
        knob: the configuration key to change first.
    """

    role: str
    part: str
    fraction: float
    text: str
    knob: str

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1 + 1e-9:
            raise ValueError(f"fraction={self.fraction} must be in 0..1")

    def to_json(self) -> dict[str, str | float]:
        """Return it as values of JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Advice:
    """Why time is wasted, what to do, and the key to change first."""

    reason: str
    remedy: str
    knob: str


def largest_waste(fractions: Fractions, facts: WasteFacts) -> Waste | None:
    """Return the largest part of the learner's or engines' time that is not their work.

    Args:
        fractions: of each role; the actor's parts are used to tell the reason.
        facts: of the configuration.

    Returns:
        None if no part is above 5 %, or nothing was measured.
    """
    wasted = {
        (role, part): fraction
        for role, work in _WORK.items()
        for part, fraction in fractions.get(role, {}).items()
        if part not in work and fraction > _NEGLIGIBLE
    }
    if not wasted:
        return None
    role, part = max(wasted, key=lambda key: wasted[key])
    advise = _ADVICE.get((role, part), _unknown_part)
    advice = advise(fractions, facts)
    fraction = min(1.0, wasted[role, part])
    who = "the learner" if role == "learner" else "the engines"
    does = _DOES.get((role, part), f"spend in {part}" if role == "engine" else f"spends in {part}")
    return Waste(
        role=role,
        part=part,
        fraction=fraction,
        text=f"{who} {does} {100 * fraction:.0f} % of the time: {advice.reason}; {advice.remedy}",
        knob=advice.knob,
    )


_DOES = {
    ("learner", "wait"): "waits for data",
    ("learner", "prepare"): "prepares batches",
    ("learner", "proximal"): "computes the logprobs of the old policy",
    ("learner", "step"): "updates the weights",
    ("learner", "snapshot"): "copies weights to publish",
    ("learner", "checkpoint"): "copies its state for checkpoints",
    ("engine", "idle"): "have no requests",
    ("engine", "wait_episodes"): "wait for the episodes beside them in the same process",
    ("engine", "swap"): "stand still for new weights",
}


def _learner_waits(fractions: Fractions, facts: WasteFacts) -> _Advice:
    if facts.main_filter is not None:
        reason, key = facts.main_filter
        return _Advice(
            f"most groups are played for nothing, as filters reject them ({reason})",
            f"tasks that fit the policy, a larger rollout.group_size, or no {key}",
            key,
        )
    if facts.staleness_max == 0:
        return _synchronous()
    cause = _main_part(fractions)
    if cause == "wait_engine":
        return _Advice(
            "the slots wait for a place in an engine",
            f"more {facts.more_engines}, or a larger engine.max_concurrent",
            facts.more_engines,
        )
    if cause == "generate" or cause is None:
        return _Advice(
            "the slots are busy generating, so the engines are too slow for it",
            f"more {facts.more_engines}, or a larger staleness.max",
            facts.more_engines,
        )
    return _slots_wait(cause)


def _engine_idle(fractions: Fractions, facts: WasteFacts) -> _Advice:
    cause = _main_part(fractions, without=("generate", "wait_engine"))
    learner = fractions.get("learner", {})
    if cause == "wait_admission" and learner and learner.get("wait", 0.0) < 0.2:
        return _Advice(
            "the learner is busy, and the slots wait for it to use what is there",
            f"more learner.num_ranks, or fewer {facts.more_engines}",
            "learner.num_ranks",
        )
    if facts.staleness_max == 0:
        return _synchronous()
    return _slots_wait(cause or "wait_admission")


def _synchronous() -> _Advice:
    return _Advice(
        "with staleness.max=0 learner and engines take turns",
        "a larger staleness.max lets them work at the same time",
        "staleness.max",
    )


def _slots_wait(cause: str) -> _Advice:
    """Return the advice for slots that mostly do something other than generating."""
    if cause == "environment":
        return _Advice(
            "the slots wait for their environments",
            "more episodes in flight (a larger staleness.max or learner.groups_per_step), or more "
            "environment.num_processes",
            "staleness.max",
        )
    if cause == "wait_group":
        return _Advice(
            "the slots wait for the slowest episode of their group",
            "more groups in flight (a larger staleness.max), or a smaller environment.max_turns",
            "staleness.max",
        )
    if cause == "other":
        return _Advice(
            "the actors are busy with their own work, such as turning text into tokens",
            "more rollout.num_actors",
            "rollout.num_actors",
        )
    return _Advice(
        "the slots wait for admission, which keeps the staleness within its bound",
        "a larger staleness.max, or a larger learner.groups_per_step",
        "staleness.max",
    )


def _swap(fractions: Fractions, facts: WasteFacts) -> _Advice:
    if facts.kv_after_swap == "recompute":
        return _Advice(
            "each swap makes them compute the running requests again",
            "engine.kv_after_swap=keep, or fewer versions by a larger learner.groups_per_step",
            "engine.kv_after_swap",
        )
    return _Advice(
        "new weights come often",
        "fewer versions by a larger learner.groups_per_step",
        "learner.groups_per_step",
    )


def _main_part(fractions: Fractions, *, without: Sequence[str] = ()) -> str | None:
    """Return what the slots of the actors spend most of their time on, None if that is unknown."""
    parts = {
        part: fraction
        for part, fraction in fractions.get("actor", {}).items()
        if part not in without and fraction > 0
    }
    return max(parts, key=lambda part: parts[part]) if parts else None


def _always(reason: str, remedy: str, knob: str) -> Callable[[Fractions, WasteFacts], _Advice]:
    return lambda fractions, facts: _Advice(reason, remedy, knob)


_unknown_part = _always(
    "it is the same for every step",
    "more groups in each: learner.groups_per_step",
    "learner.groups_per_step",
)

_ADVICE: Mapping[tuple[str, str], Callable[[Fractions, WasteFacts], _Advice]] = {
    ("learner", "wait"): _learner_waits,
    ("learner", "prepare"): _always(
        "packing and advantages are computed before each step",
        "fewer and larger microbatches: learner.tokens_per_microbatch",
        "learner.tokens_per_microbatch",
    ),
    ("learner", "proximal"): _always(
        "each step begins with another forward pass",
        "algorithm.proximal=interpolated needs none",
        "algorithm.proximal",
    ),
    ("learner", "step"): _always(
        "each minibatch ends with an update of all weights",
        "fewer of them: a smaller learner.num_minibatches",
        "learner.num_minibatches",
    ),
    ("learner", "snapshot"): _always(
        "each version is copied before it is published",
        "fewer versions by a larger learner.groups_per_step, or a smaller one: "
        "lora.publish=adapter",
        "learner.groups_per_step",
    ),
    ("learner", "checkpoint"): _always(
        "checkpoints come often", "a larger checkpoint.every_steps", "checkpoint.every_steps"
    ),
    ("engine", "idle"): _engine_idle,
    ("engine", "wait_episodes"): _always(
        "engine and episodes take turns on one core",
        "more rollout.num_actors, each with a core of its own, or environment.in_process=false",
        "rollout.num_actors",
    ),
    ("engine", "swap"): _swap,
}
