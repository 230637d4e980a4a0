"""What is known of a finished group without its tokens.

Where actors, coordinator and learner are processes of their own, tokens travel from the actor to
the learner, and the coordinator handles headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from skyrl_async.types.trajectories import (
    DropReason,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)


class TrajectoryHeader(NamedTuple):
    """A trajectory without its tokens; a tuple, because many are pickled with every report."""

    reward: float
    """Sum over the turns."""
    status: TrajectoryStatus
    """How it ended."""
    num_turns: int
    """Replies in it."""
    num_generated_tokens: int
    """Tokens that the policy sampled."""
    version_counts: tuple[tuple[int, int], ...]
    """For each policy version that sampled any: the version, and the number of its tokens; the
    oldest version first."""

    @classmethod
    def of(cls, trajectory: Trajectory) -> TrajectoryHeader:
        """Return the header of a trajectory."""
        oldest, newest = trajectory.min_policy_version, trajectory.max_policy_version
        counts: tuple[tuple[int, int], ...] = ((oldest, trajectory.num_generated_tokens),)
        if oldest != newest:
            sampled = trajectory.policy_versions[trajectory.sampled]
            versions, numbers = np.unique(sampled, return_counts=True)
            counts = tuple(zip(versions.tolist(), numbers.tolist(), strict=True))
        return cls(
            reward=trajectory.reward,
            status=trajectory.status,
            num_turns=trajectory.num_turns,
            num_generated_tokens=trajectory.num_generated_tokens,
            version_counts=counts,
        )

    @property
    def min_policy_version(self) -> int:
        """Of its oldest token."""
        return self.version_counts[0][0]

    @property
    def max_policy_version(self) -> int:
        """Of its newest token."""
        return self.version_counts[-1][0]

    def num_tokens_since(self, policy_version: int) -> int:
        """Return how many sampled tokens are of this version or a newer one."""
        return sum(number for version, number in self.version_counts if version >= policy_version)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupHeader:
    """A group without its tokens.

    Attributes:
        group_id: unique within the run; given at admission.
        task_id: the task that all members played.
        trajectories: headers of the members that finished; at least one.
        failures: why the other members are missing.
        min_policy_version: of the oldest token.
        max_policy_version: of the newest token.
        num_generated_tokens: of all members.
        size_bytes: of the whole group, tokens included.
        place: where the tokens are, in the words of the runtime that keeps them.
    """

    group_id: int
    task_id: str
    trajectories: tuple[TrajectoryHeader, ...]
    failures: tuple[DropReason, ...] = ()
    min_policy_version: int
    max_policy_version: int
    num_generated_tokens: int
    size_bytes: int
    place: Any = None

    @classmethod
    def of(cls, group: TrajectoryGroup) -> GroupHeader:
        """Return the header of a group, without a place."""
        return cls(
            group_id=group.group_id,
            task_id=group.task_id,
            trajectories=tuple(TrajectoryHeader.of(t) for t in group.trajectories),
            failures=group.failures,
            min_policy_version=group.min_policy_version,
            max_policy_version=group.max_policy_version,
            num_generated_tokens=group.num_generated_tokens,
            size_bytes=group.size_bytes,
        )


AnyGroup: TypeAlias = TrajectoryGroup | GroupHeader
"""A finished group, with its tokens here or elsewhere; both tell the same about it."""
