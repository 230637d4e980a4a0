"""Finished trajectories, and the groups that are trained together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyrl_async.types.arrays import BoolArray, Float32Array, Int32Array, frozen
from skyrl_async.types.generations import Turn

BYTES_PER_TOKEN = 13
"""Bytes that one token takes in a trajectory: token id, sampled flag, logprob, policy version."""


RECORD_OVERHEAD_BYTES = 512
"""Bytes charged for the fixed fields of one trajectory, so that empty ones are not free."""


class TrajectoryStatus(StrEnum):
    """How a trajectory ended."""

    TERMINATED = "terminated"
    """The environment ended the task."""
    TRUNCATED = "truncated"
    """A limit ended it: turns, context length, or the environment's own."""


class DropReason(StrEnum):
    """Why a group, or one member of it, leaves before it was trained."""

    ENVIRONMENT_ERROR = "environment_error"
    STEP_TIMEOUT = "step_timeout"
    EPISODE_TIMEOUT = "episode_timeout"
    NONFINITE_REWARD = "nonfinite_reward"
    OVERLONG_OBSERVATION = "overlong_observation"
    TOO_FEW_MEMBERS = "too_few_members"
    """Fewer trajectories than the group-relative advantage needs finished without failing."""
    STALE = "stale"
    """Beyond ``staleness.max`` when it was sampled for training."""
    NONFINITE_UPDATE = "nonfinite_update"
    """The learner step that used it was skipped, because its loss or gradient was not finite."""
    ZERO_VARIANCE = "zero_variance"
    """All members have the same reward, so that none is better than another; a filter's choice."""
    PASS_RATE = "pass_rate"
    """Too many members solved the task; a filter's choice."""
    TRUNCATED = "truncated"
    """Too many members ran into a limit of length; a filter's choice."""
    ROLLBACK = "rollback"
    """Generated before the learner went back to earlier weights."""
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One run of an environment as one token sequence ``[T]``, with the sum of its rewards.

    Attributes:
        token_ids: prompt, replies and later observations in order, exactly as the policy saw them.
        sampled: true on tokens that the policy sampled.
        behavior_logprobs: of the engine at sampling; 0 where nothing was sampled.
        policy_versions: version that sampled each token; -1 where nothing was sampled.
        temperature: that sampled the tokens.
        reward: sum over the turns.
        status: how it ended.
        num_turns: replies in it.

    Raises:
        ValueError: if lengths differ, no token was sampled, the first one was, or the reward is not
            finite.
    """

    token_ids: Int32Array
    sampled: BoolArray
    behavior_logprobs: Float32Array
    policy_versions: Int32Array
    temperature: float
    reward: float
    status: TrajectoryStatus
    num_turns: int
    num_generated_tokens: int = field(init=False)
    min_policy_version: int = field(init=False)
    max_policy_version: int = field(init=False)
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "token_ids", frozen(self.token_ids, np.int32, "token_ids"))
        set_(self, "sampled", frozen(self.sampled, np.bool_, "sampled"))
        logprobs = frozen(self.behavior_logprobs, np.float32, "behavior_logprobs")
        set_(self, "behavior_logprobs", logprobs)
        versions = frozen(self.policy_versions, np.int32, "policy_versions")
        set_(self, "policy_versions", versions)
        length = len(self.token_ids)
        if not length == len(self.sampled) == len(logprobs) == len(versions):
            raise ValueError(
                f"arrays of a trajectory differ in length: {length} token ids, "
                f"{len(self.sampled)} sampled, {len(logprobs)} logprobs, {len(versions)} versions"
            )
        if not math.isfinite(self.reward):
            raise ValueError(f"reward must be finite, got {self.reward}")
        sampled_versions = versions[self.sampled]
        if not len(sampled_versions):
            raise ValueError("a trajectory needs at least one sampled token")
        if self.sampled[0]:
            raise ValueError("the first token cannot be sampled: a prompt comes first")
        set_(self, "num_generated_tokens", len(sampled_versions))
        set_(self, "min_policy_version", int(sampled_versions.min()))
        set_(self, "max_policy_version", int(sampled_versions.max()))
        set_(self, "size_bytes", RECORD_OVERHEAD_BYTES + BYTES_PER_TOKEN * length)

    def num_tokens_since(self, policy_version: int) -> int:
        """Return how many sampled tokens are of this version or a newer one."""
        # Tokens that were not sampled carry version -1.
        return int(np.count_nonzero(self.policy_versions >= max(0, policy_version)))

    @classmethod
    def from_turns(
        cls, turns: Sequence[Turn], *, reward: float, status: TrajectoryStatus
    ) -> Trajectory:
        """Concatenate ``turns`` in order.

        Raises:
            ValueError: as the class, and if the turns were sampled at different temperatures.
        """
        temperatures = {turn.generation.temperature for turn in turns}
        if len(temperatures) > 1:
            raise ValueError(f"turns were sampled at several temperatures: {sorted(temperatures)}")
        ids: list[Any] = []
        sampled: list[Any] = []
        logprobs: list[Any] = []
        versions: list[Any] = []
        for turn in turns:
            observed, generation = len(turn.observation_token_ids), turn.generation
            ids += (turn.observation_token_ids, generation.token_ids)
            sampled += (np.zeros(observed, np.bool_), np.ones(len(generation.token_ids), np.bool_))
            logprobs += (np.zeros(observed, np.float32), generation.logprobs)
            versions += (np.full(observed, -1, np.int32), generation.policy_versions)
        if not turns:
            raise ValueError("a trajectory needs at least one turn")
        arrays = [np.concatenate(parts) for parts in (ids, sampled, logprobs, versions)]
        for array in arrays:
            array.setflags(write=False)  # nobody else has them, so they need not be copied
        return cls(
            token_ids=arrays[0],
            sampled=arrays[1],
            behavior_logprobs=arrays[2],
            policy_versions=arrays[3],
            temperature=temperatures.pop(),
            reward=reward,
            status=status,
            num_turns=len(turns),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrajectoryGroup:
    """The finished trajectories of one task.

    Attributes:
        group_id: unique within the run; given at admission.
        task_id: the task that all members played.
        trajectories: the members that finished; at least one.
        failures: why the other members are missing.
    """

    group_id: int
    task_id: str
    trajectories: tuple[Trajectory, ...]
    failures: tuple[DropReason, ...] = ()
    min_policy_version: int = field(init=False)
    max_policy_version: int = field(init=False)
    num_generated_tokens: int = field(init=False)
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        members = self.trajectories
        if not members:
            raise ValueError("a group needs at least one trajectory; use DroppedGroup otherwise")
        set_ = object.__setattr__
        set_(self, "min_policy_version", min(t.min_policy_version for t in members))
        set_(self, "max_policy_version", max(t.max_policy_version for t in members))
        set_(self, "num_generated_tokens", sum(t.num_generated_tokens for t in members))
        set_(self, "size_bytes", sum(t.size_bytes for t in members))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all members as four flat arrays: a tenth of the cost of one array at a time."""
        members = self.trajectories
        arrays = tuple(
            np.concatenate([getattr(t, name) for t in members]) for name in _TRAJECTORY_ARRAYS
        )
        scalars = [
            (
                len(t.token_ids),
                t.temperature,
                t.reward,
                t.status.value,
                t.num_turns,
                t.num_generated_tokens,
                t.min_policy_version,
                t.max_policy_version,
                t.size_bytes,
            )
            for t in members
        ]
        failures = tuple(f.value for f in self.failures)
        return _unpack_group, (self.group_id, self.task_id, failures, scalars, *arrays)


_TRAJECTORY_ARRAYS = ("token_ids", "sampled", "behavior_logprobs", "policy_versions")


_TRAJECTORY_SCALARS = (
    "temperature",
    "reward",
    "status",
    "num_turns",
    "num_generated_tokens",
    "min_policy_version",
    "max_policy_version",
    "size_bytes",
)


_STATUS_BY_VALUE = {status.value: status for status in TrajectoryStatus}


def _unpack_group(
    group_id: int,
    task_id: str,
    failures: tuple[str, ...],
    scalars: list[tuple[Any, ...]],
    *arrays: NDArray[Any],
) -> TrajectoryGroup:
    """Rebuild a group whose members were checked when they were made; members share memory."""
    for array in arrays:
        array.setflags(write=False)
    set_ = object.__setattr__
    members = []
    start = 0
    for length, temperature, reward, status, *numbers in scalars:
        trajectory = Trajectory.__new__(Trajectory)
        for name, array in zip(_TRAJECTORY_ARRAYS, arrays, strict=True):
            set_(trajectory, name, array[start : start + length])
        values = (temperature, reward, _STATUS_BY_VALUE[status], *numbers)
        for name, value in zip(_TRAJECTORY_SCALARS, values, strict=True):
            set_(trajectory, name, value)
        members.append(trajectory)
        start += length
    return TrajectoryGroup(
        group_id=group_id,
        task_id=task_id,
        trajectories=tuple(members),
        failures=tuple(DropReason(f) for f in failures),
    )
