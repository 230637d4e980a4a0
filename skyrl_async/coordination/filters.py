"""Which finished groups are not worth training; the slots of rejected ones play other tasks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from skyrl_async.types import AnyGroup, DroppedGroup, DropReason, TrajectoryStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSettings:
    """What is rejected; the default keeps everything.

    Attributes:
        zero_variance: groups whose members all have the same reward (DAPO, arXiv 2503.14476).
        max_pass_rate: groups of which at least this share reaches ``pass_reward`` (ScaleRL, arXiv
            2510.13786); None for no limit.
        pass_reward: of a member that has solved the task.
        max_truncated_fraction: groups of which a larger share was truncated; None for no limit.
        max_rejected_in_a_row: then the next group is kept, whatever it is.
    """

    zero_variance: bool = False
    max_pass_rate: float | None = None
    pass_reward: float = 1.0
    max_truncated_fraction: float | None = None
    max_rejected_in_a_row: int = 16


def rejection(group: AnyGroup, settings: FilterSettings) -> DropReason | None:
    """Return why a group is not worth training; None if it is."""
    rewards = [t.reward for t in group.trajectories]
    if settings.zero_variance and min(rewards) == max(rewards):
        return DropReason.ZERO_VARIANCE
    if settings.max_pass_rate is not None:
        passed = sum(reward >= settings.pass_reward for reward in rewards)
        if passed >= settings.max_pass_rate * len(rewards):
            return DropReason.PASS_RATE
    if settings.max_truncated_fraction is not None:
        truncated = sum(t.status is TrajectoryStatus.TRUNCATED for t in group.trajectories)
        if truncated > settings.max_truncated_fraction * len(rewards):
            return DropReason.TRUNCATED
    return None


class GroupFilter:
    """Rejects groups, but never so many in a row that training would wait for ever.

    ::

        rejected = group_filter.check(group)      # for every group that finished
        if rejected is None: insert the group     # else drop it; its slot is free

    Args:
        settings: what to reject.
    """

    def __init__(self, settings: FilterSettings) -> None:
        self._settings = settings
        self._rejected_in_a_row = 0
        self._has_warned = False

    def check(self, group: AnyGroup) -> DroppedGroup | None:
        """Return the group as a dropped one if it is rejected."""
        reason = rejection(group, self._settings)
        if reason is not None and self._rejected_in_a_row >= self._settings.max_rejected_in_a_row:
            self._warn_once(reason)
            reason = None
        if reason is None:
            self._rejected_in_a_row = 0
            return None
        self._rejected_in_a_row += 1
        return DroppedGroup(
            group_id=group.group_id,
            reason=reason,
            num_generated_tokens=group.num_generated_tokens,
        )

    def _warn_once(self, reason: DropReason) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "filters: %d groups in a row were rejected, so one is trained that they reject as well "
            "(%s), lest training wait for ever; filters.max_rejected_in_a_row says after how many",
            self._rejected_in_a_row,
            reason.value,
        )
