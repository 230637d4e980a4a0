"""Every record that crosses a component boundary, in the order in which data flows.

All records are frozen and checked when they are made; each stage makes a new record, so no field is
filled in later. Token data are numpy arrays that are made read-only here:

* ``token_ids``       int32   ``[T]``
* ``logprobs``        float32 ``[T]``, natural log, of ``softmax(logits / temperature)`` over the
  whole vocabulary, at the temperature that sampled the token
* ``policy_versions`` int32   ``[T]``, finished learner steps of the weights that sampled a token

Example: a two-turn trajectory of a guessing game. The prompt is 4 tokens, each reply is a number
and a stop token, and the weights were swapped from version 3 to version 4 between the replies::

    turn 0: observation_token_ids=[u g n a]  generation.token_ids=[5 .] policy_versions=[3 3]
    turn 1: observation_token_ids=[u hi a]   generation.token_ids=[8 .] policy_versions=[4 4]

The sequence to train on is the concatenation ``[u g n a 5 . u hi a 8 .]``; only ``5 . 8 .`` carry
loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

BYTES_PER_TOKEN = 13
"""Bytes that one token takes in a trajectory: token id, sampled flag, logprob, policy version."""

RECORD_OVERHEAD_BYTES = 512
"""Bytes charged for the fixed fields of one trajectory, so that empty ones are not free."""


def _frozen(values: Any, dtype: type[np.generic], name: str) -> NDArray[Any]:
    """Return ``values`` as a read-only one-dimensional array.

    Raises:
        ValueError: if the values do not form one dimension.
    """
    array = np.asarray(values, dtype=dtype)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.flags.writeable:
        array = array.copy() if array.base is not None or array is values else array
        array.setflags(write=False)
    return array


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token was sampled; it is the last token."""
    LENGTH = "length"
    """``max_tokens`` or the context length was reached."""
    ABORT = "abort"
    """The request was aborted; the tokens sampled so far are kept."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem: a prompt and what is needed to score it.

    Attributes:
        task_id: unique within its source; the same task has the same id in every run.
        environment: registered name of the environment that plays it.
        seed: given to ``Environment.reset``; all members of a group share it.
        messages: chat messages (``{"role": ..., "content": ...}``) before the first observation.
        extras: given to ``Environment.reset`` as ``options``.
    """

    task_id: str
    environment: str
    seed: int
    messages: tuple[Mapping[str, str], ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.task_id or not self.environment:
            raise ValueError("task_id and environment must not be empty")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one reply.

    Attributes:
        max_tokens: at most this many tokens, the stop token included.
        temperature: divides the logits; 0 is greedy (then logprobs are those of temperature 1).
        top_p: nucleus probability, 1 for the whole vocabulary (training requires 1).
        top_k: number of most likely tokens kept, 0 for the whole vocabulary (training requires 0).
        stop_token_ids: a sampled one ends the reply and is part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """What an engine returned for one request; three arrays of one length ``T`` (0 is possible).

    ``routed_experts`` and ``sampling_masks`` are what routing replay and sampling-mask replay need;
    no engine fills them yet.

    Raises:
        ValueError: on unequal lengths, logprobs that are not finite or above 0, negative or
            decreasing policy versions.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    policy_versions: Int32Array
    temperature: float
    finish_reason: FinishReason
    routed_experts: NDArray[np.int16] | None = None
    """``[T, layers, experts per token]``, the experts that computed each token."""
    sampling_masks: tuple[Int32Array, ...] | None = None
    """For each token the ids that top-p and top-k left to sample from."""
    queued_s: float = 0.0
    """Seconds in which the request waited because the engine had no place for it."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "token_ids", _frozen(self.token_ids, np.int32, "token_ids"))
        set_(self, "logprobs", _frozen(self.logprobs, np.float32, "logprobs"))
        set_(self, "policy_versions", _frozen(self.policy_versions, np.int32, "policy_versions"))
        lengths = (len(self.token_ids), len(self.logprobs), len(self.policy_versions))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"token_ids, logprobs, policy_versions differ in length: {lengths}; "
                "an engine must report all three for every token"
            )
        for name in ("routed_experts", "sampling_masks"):
            recorded = getattr(self, name)
            if recorded is not None and len(recorded) != lengths[0]:
                raise ValueError(
                    f"{name} has {len(recorded)} entries for {lengths[0]} tokens; one for each, or "
                    "None"
                )
        if lengths[0]:
            # max() is NaN when any value is NaN, so one comparison finds NaN, +inf and > 0.
            if not (self.logprobs.max() <= 1e-4 and self.logprobs.min() > -math.inf):
                raise ValueError("logprobs must be finite and <= 0")
            versions = self.policy_versions
            if versions[0] < 0 or (versions[0] != versions[-1] and (np.diff(versions) < 0).any()):
                raise ValueError("policy_versions must be >= 0 and never decrease")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """The tokens that the environment appended, then the tokens that the policy sampled.

    Attributes:
        observation_token_ids: ``[P]``, everything between the previous reply and this one (for the
            first turn the whole prompt), chat template included.
        generation: the reply, exactly as sampled; it is never re-tokenised.
    """

    observation_token_ids: Int32Array
    generation: Generation

    def __post_init__(self) -> None:
        ids = _frozen(self.observation_token_ids, np.int32, "observation_token_ids")
        object.__setattr__(self, "observation_token_ids", ids)


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
        set_(self, "token_ids", _frozen(self.token_ids, np.int32, "token_ids"))
        set_(self, "sampled", _frozen(self.sampled, np.bool_, "sampled"))
        logprobs = _frozen(self.behavior_logprobs, np.float32, "behavior_logprobs")
        set_(self, "behavior_logprobs", logprobs)
        versions = _frozen(self.policy_versions, np.int32, "policy_versions")
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
        return cls(
            token_ids=np.concatenate(ids),
            sampled=np.concatenate(sampled),
            behavior_logprobs=np.concatenate(logprobs),
            policy_versions=np.concatenate(versions),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One admitted task on its way to a rollout actor.

    Attributes:
        group_id: given at admission.
        task: to be played by all members of the group.
    """

    group_id: int
    task: Task


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
    groups: tuple[TrajectoryGroup | DroppedGroup, ...]
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledGroup:
    """A group leased to the learner for one step, with its cut-off.

    Attributes:
        group: the frozen group.
        min_trainable_version: tokens sampled by an older version stay out of the loss.
    """

    group: TrajectoryGroup
    min_trainable_version: int


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """A group in the replay buffer, with its uses so far.

    Attributes:
        group: the frozen group.
        times_sampled: finished learner steps that trained it.
        made_version: policy version that its last use made; None before the first.
    """

    group: TrajectoryGroup
    times_sampled: int = 0
    made_version: int | None = None

    def __post_init__(self) -> None:
        if self.times_sampled < 0 or (self.times_sampled == 0) != (self.made_version is None):
            raise ValueError(
                f"times_sampled={self.times_sampled} does not fit made_version={self.made_version}"
            )


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSequence:
    """One contiguous token sequence with everything that the loss needs; all arrays ``[T]``.

    Attributes:
        token_ids: prompt, replies and observations in order.
        loss_mask: true on tokens that enter the loss (sampled by the policy, not too old).
        behavior_logprobs: of the engine at sampling; 0 where nothing was sampled.
        policy_versions: version that sampled each token; -1 where nothing was sampled.
        temperature: that sampled the tokens.
        advantages: credit per token; 0 outside the loss.
        reward: of the whole trajectory.
        group_id: of its group, whose members share a prompt.
    """

    token_ids: Int32Array
    loss_mask: BoolArray
    behavior_logprobs: Float32Array
    policy_versions: Int32Array
    temperature: float
    advantages: Float32Array
    reward: float
    group_id: int

    def __post_init__(self) -> None:
        arrays = (self.loss_mask, self.behavior_logprobs, self.policy_versions, self.advantages)
        if any(len(a) != len(self.token_ids) for a in arrays):
            raise ValueError(
                f"arrays of a sequence differ in length: {len(self.token_ids)} token ids, "
                f"{[len(a) for a in arrays]} others"
            )
        if len(self.loss_mask) and self.loss_mask[0]:
            raise ValueError("the first token cannot carry loss: nothing predicts it")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one learner step did.

    Attributes:
        policy_version: after the step; unchanged if the step was skipped.
        skipped: true if a loss or gradient was not finite; then nothing was changed.
        metrics: scalars under the run's metric names.
        staleness_counts: number of trained tokens by staleness, for the histogram.
        seconds: wall time of the learner by part, since the step before.
    """

    policy_version: int
    skipped: bool
    metrics: Mapping[str, float]
    staleness_counts: Mapping[int, int]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Describes one published version, sent before its bytes.

    Attributes:
        policy_version: the version that the weights make live.
        names: Hugging Face parameter names, in the order of the bytes.
        dtypes: torch dtype names, for example ``float32``.
        shapes: one per name.
        checksum: CRC-32 of all bytes, in order.
    """

    policy_version: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    checksum: int

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError(
                f"manifest lists differ in length: {len(self.names)} names, "
                f"{len(self.dtypes)} dtypes, {len(self.shapes)} shapes"
            )
        if self.policy_version < 0:
            raise ValueError(f"policy_version must be >= 0, got {self.policy_version}")
