"""Small groups whose tokens have given policy versions."""

from __future__ import annotations

import numpy as np

from skyrl_async.types import (
    BYTES_PER_TOKEN,
    RECORD_OVERHEAD_BYTES,
    DropReason,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)

GROUP_SIZE = 2
MAX_SAMPLED_TOKENS = 12
LARGEST_GROUP_BYTES = GROUP_SIZE * (
    RECORD_OVERHEAD_BYTES + BYTES_PER_TOKEN * (1 + MAX_SAMPLED_TOKENS)
)


def make_group(
    group_id: int, versions: list[list[int]], failures: tuple[DropReason, ...] = ()
) -> TrajectoryGroup:
    """A group whose members sampled one token with each of the given versions."""
    members = []
    for sampled in versions:
        length = 1 + len(sampled)
        members.append(
            Trajectory(
                token_ids=np.zeros(length, np.int32),
                sampled=np.arange(length) > 0,
                behavior_logprobs=np.full(length, -1, np.float32),
                policy_versions=np.array([-1, *sampled], np.int32),
                temperature=1.0,
                reward=0.0,
                status=TrajectoryStatus.TERMINATED,
                num_turns=1,
            )
        )
    return TrajectoryGroup(
        group_id=group_id, task_id="t", trajectories=tuple(members), failures=failures
    )
