"""What the replay buffer holds, hands out and lets go."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from skyrl_async.types.headers import AnyGroup
from skyrl_async.types.trajectories import DropReason, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """A group in the replay buffer, with its uses so far.

    Attributes:
        group: the frozen group, or its header.
        times_sampled: finished learner steps that trained it.
        made_version: policy version that its last use made; None before the first.
    """

    group: AnyGroup
    times_sampled: int = 0
    made_version: int | None = None

    def __post_init__(self) -> None:
        if self.times_sampled < 0 or (self.times_sampled == 0) != (self.made_version is None):
            raise ValueError(
                f"times_sampled={self.times_sampled} does not fit made_version={self.made_version}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledGroup:
    """A group leased to the learner for one step, with its cut-off.

    Attributes:
        group: the frozen group, or its header where the tokens have not been fetched yet.
        min_trainable_version: tokens sampled by an older version stay out of the loss.
    """

    group: AnyGroup
    min_trainable_version: int

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The members, with their tokens.

        Raises:
            RuntimeError: if there is only the header here.
        """
        if not isinstance(self.group, TrajectoryGroup):
            raise RuntimeError(f"the tokens of group {self.group.group_id} were not fetched")
        return self.group.trajectories


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledBatch:
    """What the buffer hands to the learner for the step that starts at ``train_version``.

    Attributes:
        lease_id: names this batch when it is committed or returned.
        train_version: policy version at the start of the step that trains it.
        groups: exactly ``learner.groups_per_step`` groups.
    """

    lease_id: int
    train_version: int
    groups: tuple[SampledGroup, ...]


class GroupFate(StrEnum):
    """How a group leaves the replay buffer."""

    CONSUMED = "consumed"
    """It was trained as often as ``replay.max_times_sampled`` allows."""
    RETIRED = "retired"
    """It was trained at least once, and is now too old for another use."""
    DROPPED = "dropped"
    """It leaves for a :class:`DropReason`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepartedGroup:
    """A group that left the replay buffer.

    Attributes:
        stored: the group, with its uses.
        fate: how it left.
        reason: why it was dropped; None for the other fates.
    """

    stored: StoredGroup
    fate: GroupFate
    reason: DropReason | None = None

    def __post_init__(self) -> None:
        if (self.fate is GroupFate.DROPPED) != (self.reason is not None):
            raise ValueError(f"fate {self.fate} does not fit reason {self.reason}")
