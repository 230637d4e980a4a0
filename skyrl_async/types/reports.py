"""What rollout actors report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skyrl_async.types.headers import AnyGroup
from skyrl_async.types.trajectories import DropReason


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedGroup:
    """A group that left before training.

    Attributes:
        group_id: given at admission.
        reason: why the group left.
        failures: why its members failed, if they did.
        num_generated_tokens: tokens whose generation was lost with it.
        detail: one line for people, for example the environment's exception.
    """

    group_id: int
    reason: DropReason
    failures: tuple[DropReason, ...] = ()
    num_generated_tokens: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutReport:
    """What happened at one rollout actor since its last report.

    Attributes:
        engine_version: policy version that its engine has loaded.
        groups: finished or dropped, each exactly once.
        seconds: wall time of the actor's slots by part, all slots together.
        engine_seconds: wall time of its engine by part.
        counts: tokens, decode steps and the like, to be summed.
        maxima: for example the longest gap between two decode steps, in seconds.
    """

    engine_version: int
    groups: tuple[AnyGroup | DroppedGroup, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    engine_seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Greedy play of held-out tasks by one pinned policy version.

    Attributes:
        policy_version: that played all of them.
        mean_reward: over all tasks; a failed one counts 0.
        num_tasks: played.
        num_failures: tasks that the environment failed.
    """

    policy_version: int
    mean_reward: float
    num_tasks: int
    num_failures: int
