"""What the learner trains on, what a step did, and what is published after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skyrl_async.types.arrays import BoolArray, Float32Array, Int32Array


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
        truncated: whether a limit ended it, and not the environment.
    """

    token_ids: Int32Array
    loss_mask: BoolArray
    behavior_logprobs: Float32Array
    policy_versions: Int32Array
    temperature: float
    advantages: Float32Array
    reward: float
    group_id: int
    truncated: bool = False

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
