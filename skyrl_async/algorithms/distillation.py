"""Learning from a teacher's logprobs of the policy's own tokens: pure functions.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationSettings:
    """How much the teacher's opinion counts, and how much the rewards do.

    Attributes:
        coefficient: of the log ratio of teacher to student.
        reward_weight: of the advantages from rewards; 0 for the teacher alone.
        max_log_ratio: limit of the log ratio's magnitude, in nats; None for no limit.

    Raises:
        ValueError: if a number is out of range.
    """

    coefficient: float = 1.0
    reward_weight: float = 0.0
    max_log_ratio: float | None = 10.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(f"coefficient={self.coefficient}: must be finite and > 0")
        if not (math.isfinite(self.reward_weight) and self.reward_weight >= 0):
            raise ValueError(f"reward_weight={self.reward_weight}: must be finite and >= 0")
        if self.max_log_ratio is not None and not self.max_log_ratio > 0:
            raise ValueError(f"max_log_ratio={self.max_log_ratio}: must be > 0, or None")


def on_policy_distillation(
    advantages: Tensor,
    *,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    settings: DistillationSettings,
) -> Tensor:
    r"""Return ``[T]``: the advantages, with the teacher's opinion of every single token.

    .. math:: A'_t = w A_t + c \big(\log\pi_{teacher} - \log\pi_{prox}\big)

    The expectation of the log ratio under the student is minus the divergence
    :math:`KL(\pi_{prox} \| \pi_{teacher})` in the token's context, so that the policy gradient
    leads to where the teacher is most certain. A token is judged alone, without those after it
    (discount 0). Whitening, if any, comes before: the scale of a log ratio has a meaning.

    Args:
        advantages: ``[T]``, from rewards.
        student_logprobs: ``[T]``, of the weights at the start of the step.
        teacher_logprobs: ``[T]``, of the same tokens at the same temperature.
        settings: how much each of them counts.

    Source: Thinking Machines 2025, On-Policy Distillation; as a divergence to minimize: GKD
    (arXiv 2306.13649).
    """
    log_ratios = teacher_logprobs - student_logprobs
    if settings.max_log_ratio is not None:
        log_ratios = log_ratios.clamp(-settings.max_log_ratio, settings.max_log_ratio)
    return settings.reward_weight * advantages + settings.coefficient * log_ratios
