"""What an engine returns, and the turn that it is part of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from skyrl_async.types.arrays import Float32Array, Int32Array, frozen


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token was sampled; it is the last token."""
    LENGTH = "length"
    """``max_tokens`` or the context length was reached."""
    ABORT = "abort"
    """The request was aborted; the tokens sampled so far are kept."""


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
        set_(self, "token_ids", frozen(self.token_ids, np.int32, "token_ids"))
        set_(self, "logprobs", frozen(self.logprobs, np.float32, "logprobs"))
        set_(self, "policy_versions", frozen(self.policy_versions, np.int32, "policy_versions"))
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
        ids = frozen(self.observation_token_ids, np.int32, "observation_token_ids")
        object.__setattr__(self, "observation_token_ids", ids)
