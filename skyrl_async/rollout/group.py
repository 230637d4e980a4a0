"""All trajectories of one task, played at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.types import Assignment, DroppedGroup, DropReason, Trajectory, TrajectoryGroup


async def play_group(
    assignment: Assignment,
    *,
    group_size: int,
    play_member: Callable[[Assignment, int], Awaitable[Trajectory]],
) -> TrajectoryGroup | DroppedGroup:
    """Play ``assignment.task`` ``group_size`` times; a member that fails does not sink the others.

    Args:
        assignment: the task and its group id.
        group_size: number of members.
        play_member: plays one member, given its number; raises ``EnvironmentFailure`` if it fails.

    Raises:
        ValueError: if the group would have no member.
    """
    if group_size < 1:
        raise ValueError(f"rollout.group_size={group_size} must be >= 1")
    # A group-relative advantage of one trajectory is always 0.
    min_members = min(group_size, 2)
    results = await asyncio.gather(
        *(play_member(assignment, member) for member in range(group_size)), return_exceptions=True
    )
    trajectories: list[Trajectory] = []
    failures: list[EnvironmentFailure] = []
    for result in results:
        if isinstance(result, EnvironmentFailure):
            failures.append(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            trajectories.append(result)
    reasons = tuple(failure.reason for failure in failures)
    if len(trajectories) < min_members:
        return DroppedGroup(
            group_id=assignment.group_id,
            reason=reasons[0] if len(set(reasons)) == 1 else DropReason.TOO_FEW_MEMBERS,
            failures=reasons,
            num_generated_tokens=sum(t.num_generated_tokens for t in trajectories),
            detail=failures[0].detail,
        )
    return TrajectoryGroup(
        group_id=assignment.group_id,
        task_id=assignment.task.task_id,
        trajectories=tuple(trajectories),
        failures=reasons,
    )
