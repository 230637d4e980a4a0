"""What the policy losses share: surrogates that keep no gradient where a trust region ends.

The derivative of every loss here is known in closed form, so that autograd has one product to undo
in place of an exponential, its clamps and masks.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_async.algorithms.tokens import TokenLoss


@torch.no_grad()
def finite_exp(log_ratio: Tensor) -> Tensor:
    """Return the exponential, at most the root of the largest number of its type.

    So its product with 0 is 0, not NaN, and that with an advantage is finite.

    Args:
        log_ratio: ``[T]``; the result has no gradient.
    """
    return log_ratio.exp().clamp_(max=torch.finfo(log_ratio.dtype).max ** 0.5)


def with_slopes(values: Tensor, slopes: Tensor, variable: Tensor) -> Tensor:
    """Return the values, with their derivatives.

    Args:
        values: ``[T]``, without gradient.
        slopes: ``[T]``, derivative of each value by its variable; without gradient.
        variable: ``[T]``, finite, with gradient.
    """
    return values + slopes * (variable - variable.detach())


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
        log_ratio: ``[T]``, x, of one token or of its sequence; finite, with gradient.
        advantages: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        negative_cap: where the ratio ends for tokens of negative advantage; None for no end.

    Raises:
        ValueError: if the clip range is no interval around 1.
    """
    check_clip_range(clip_low, clip_high)
    with torch.no_grad():
        plain = finite_exp(log_ratio)
        bounded = plain.clamp(1 - clip_low, 1 + clip_high).mul_(advantages)
        plain.mul_(advantages)
        clipped = bounded < plain
        surrogate = torch.minimum(plain, bounded, out=bounded)
        if negative_cap is not None:
            # For advantages from 0 on, the surrogate is not below this either.
            lowest = advantages.clamp(max=0) * negative_cap
            clipped |= surrogate < lowest
            surrogate = torch.maximum(surrogate, lowest, out=lowest)
        slopes = torch.mul(surrogate, ~clipped, out=plain)
    return TokenLoss(loss=-with_slopes(surrogate, slopes, log_ratio), clipped=clipped)


def masked_surrogate(log_ratio: Tensor, advantages: Tensor, dropped: Tensor) -> TokenLoss:
    r"""Return :math:`L_t = -e^{x_t} A_t`, and 0 without gradient for the dropped tokens.

    Args:
        log_ratio: ``[T]``, x, with gradient.
        advantages: ``[T]``.
        dropped: ``[T]`` bool.
    """
    with torch.no_grad():
        # The mask comes first: the ratio is finite, and its product may not be.
        surrogate = finite_exp(log_ratio).mul_(~dropped).mul_(advantages)
    return TokenLoss(loss=-with_slopes(surrogate, surrogate, log_ratio), clipped=dropped)


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
