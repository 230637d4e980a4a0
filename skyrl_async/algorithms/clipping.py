"""What the policy losses share: ratios that keep no gradient where a trust region ends.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_async.algorithms.tokens import TokenLoss


def kept_ratio(log_ratio: Tensor, dropped: Tensor) -> Tensor:
    r"""Return :math:`e^{x_t}`, and 1 without gradient for the dropped tokens.

    The fill comes before the exponential, so that a ratio too large for the number format cannot
    turn the gradient of its dropped token into NaN.

    Args:
        log_ratio: ``[T]``, x.
        dropped: ``[T]`` bool.
    """
    return log_ratio.masked_fill(dropped, 0.0).exp()


def check_clip_range(clip_low: float, clip_high: float) -> None:
    """Refuse clip ranges whose interval ``(1 - clip_low, 1 + clip_high)`` is none.

    Raises:
        ValueError: if ``clip_low`` is outside 0 .. 1 or ``clip_high`` is negative.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in 0 .. 1, got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")


def check_cap(cap: float) -> None:
    """Refuse caps that would truncate the weight of an on-policy token.

    Raises:
        ValueError: if ``cap`` is below 1.
    """
    if not cap >= 1:
        raise ValueError(f"cap must be at least 1, got {cap}")


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    negative_cap: float | None = None,
) -> TokenLoss:
    r"""Return the pessimistic clipped objective of PPO, negated, for any log ratio.

    .. math::

        L_t = -\min\big(e^{x_t} A_t,
              \operatorname{clip}(e^{x_t}, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t\big)

    Args:
        log_ratio: ``[T]``, x, of one token or of its sequence.
        advantages: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        negative_cap: where the ratio ends for tokens of negative advantage; None for no end.

    Raises:
        ValueError: if the clip range is no interval around 1.
    """
    check_clip_range(clip_low, clip_high)
    ratio = log_ratio.detach().exp()
    above = (advantages > 0) & (ratio > 1 + clip_high)
    below = (advantages < 0) & (ratio < 1 - clip_low)
    clipped = above | below
    objective_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    if negative_cap is not None:
        capped = (advantages < 0) & (ratio > negative_cap)
        clipped = clipped | capped
        objective_ratio = objective_ratio.masked_fill(capped, negative_cap)
    kept = kept_ratio(log_ratio, clipped | (advantages == 0))
    loss = -torch.where(clipped, objective_ratio, kept) * advantages
    return TokenLoss(loss=loss, clipped=clipped)


def weighted_reinforce(
    current_logprobs: Tensor, advantages: Tensor, *, weights: Tensor, clipped: Tensor | None = None
) -> TokenLoss:
    r"""Return :math:`L_t = -\operatorname{sg}(w_t) A_t \log\pi_\theta`.

    Args:
        current_logprobs: ``[T]``.
        advantages: ``[T]``.
        weights: ``[T]``, w, without gradient; 0 for tokens without gradient.
        clipped: ``[T]`` bool, these tokens; None for none.
    """
    if clipped is None:
        clipped = torch.zeros_like(advantages, dtype=torch.bool)
    loss = -weights * advantages * current_logprobs
    return TokenLoss(loss=loss, clipped=clipped)
