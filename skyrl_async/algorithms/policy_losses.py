"""Token-level policy losses around the policy at the start of the step: pure functions.

They hold the policy ratio ``exp(current - proximal)`` in a trust region and leave the distance
between the start of the step and the policy that sampled to the importance weight of the caller.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import torch

from skyrl_async.algorithms.clipping import (
    check_clip_range,
    clipped_surrogate,
    weighted_reinforce,
    with_slopes,
)
from skyrl_async.algorithms.tokens import LossTokens, TokenLoss

_FLAT_LOG_RATIO = 30.0


def ppo_clip(tokens: LossTokens, *, clip_low: float = 0.2, clip_high: float = 0.28) -> TokenLoss:
    r"""Return the clipped surrogate of PPO with separate ranges below and above 1.

    Ratio: proximal. Times the importance weight, this is decoupled PPO.

    .. math::

        r_t &= \exp(\log\pi_\theta - \log\pi_{prox}) \\
        L_t &= -\min\big(r_t A_t,
               \operatorname{clip}(r_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t\big)

    Args:
        tokens: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1; larger than ``clip_low``, it lets unlikely tokens rise.

    Raises:
        ValueError: if the clip range is no interval around 1.

    Source: PPO (arXiv 1707.06347), equation 7; separate ranges from DAPO (arXiv 2503.14476);
    decoupled from the behavior by Hilton et al. 2022 (arXiv 2110.00641).
    """
    return clipped_surrogate(
        tokens.current_logprobs - tokens.proximal_logprobs,
        tokens.advantages,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def dual_clip(
    tokens: LossTokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    negative_cap: float = 3.0,
) -> TokenLoss:
    r"""Return the clipped surrogate of PPO that also ends where bad tokens became more likely.

    Ratio: proximal. ``ppo_clip`` leaves the ratio of a token with negative advantage unbounded
    above; here it ends at c, and the token has no gradient beyond it.

    .. math::

        J_t &= \min\big(r_t A_t,
               \operatorname{clip}(r_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t\big) \\
        L_t &= \begin{cases} -\max(J_t, c A_t) & A_t < 0 \\ -J_t & A_t \ge 0 \end{cases}

    Args:
        tokens: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        negative_cap: c, above 1.

    Raises:
        ValueError: if the clip range is no interval around 1, or ``negative_cap`` is not above 1.

    Source: Ye et al. 2020 (arXiv 1912.09729), the dual-clip objective.
    """
    if not negative_cap > 1:
        raise ValueError(f"negative_cap must be above 1, got {negative_cap}")
    return clipped_surrogate(
        tokens.current_logprobs - tokens.proximal_logprobs,
        tokens.advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        negative_cap=negative_cap,
    )


def cispo(
    tokens: LossTokens, *, clip_low: float | None = None, clip_high: float = 4.0
) -> TokenLoss:
    r"""Return REINFORCE weighted by the clipped policy ratio; every token keeps its gradient.

    Ratio: proximal. The weight is bounded where it is large; without ``clip_low`` it has no lower
    bound, as in the experiments of the paper, and it ends at ``1 + clip_high``.

    .. math::

        L_t = -\operatorname{sg}\big(
              \operatorname{clip}(r_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\big)
              A_t \log\pi_\theta

    Args:
        tokens: ``[T]``.
        clip_low: epsilon below 1; None for no lower bound.
        clip_high: epsilon above 1; 4 makes the largest weight 5.

    Raises:
        ValueError: if the clip range is no interval around 1.

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5; a largest weight of 5 from
    ScaleRL (arXiv 2510.13786).
    """
    check_clip_range(1.0 if clip_low is None else clip_low, clip_high)
    ratio = (tokens.current_logprobs - tokens.proximal_logprobs).detach().exp()
    lowest = 0.0 if clip_low is None else 1 - clip_low
    return weighted_reinforce(
        tokens.current_logprobs,
        tokens.advantages,
        weights=ratio.clamp(min=lowest, max=1 + clip_high),
    )


def sapo(tokens: LossTokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> TokenLoss:
    r"""Return the objective that a sigmoid gate flattens smoothly on both sides of ratio 1.

    Ratio: proximal. The gradient is that of ``r A`` at r = 1, for every temperature, and fades
    with the distance from it; no token is clipped.

    .. math::

        L_t = -\frac{4}{\tau_t}\, \sigma\big(\tau_t (r_t - 1)\big) A_t, \qquad
        \tau_t = \begin{cases} \tau_{pos} & A_t > 0 \\ \tau_{neg} & A_t \le 0 \end{cases}

    Args:
        tokens: ``[T]``.
        tau_positive: temperature for positive advantages; larger fades faster.
        tau_negative: temperature for the others.

    Raises:
        ValueError: if a temperature is not positive.

    Source: SAPO (arXiv 2511.20347), the objective with its gate.
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if not tau > 0:
            raise ValueError(f"{name} must be above 0, got {tau}")
    taus = torch.full_like(tokens.advantages, tau_negative)
    taus = taus.masked_fill(tokens.advantages > 0, tau_positive)
    with torch.no_grad():
        log_ratio = tokens.current_logprobs - tokens.proximal_logprobs
        # Far above 1 the gate is flat to the last bit; its ratio must not overflow before that.
        ratio = log_ratio.clamp_(max=_FLAT_LOG_RATIO).exp_()
        gate = torch.sigmoid(taus * (ratio - 1))
        slopes = ratio.mul_(4 * gate * (1 - gate)).mul_(tokens.advantages)
        values = gate.mul_(4 / taus).mul_(tokens.advantages)
    return TokenLoss(
        loss=-with_slopes(values, slopes, tokens.current_logprobs),
        clipped=torch.zeros_like(tokens.advantages, dtype=torch.bool),
    )


def reinforce(tokens: LossTokens) -> TokenLoss:
    r"""Return the plain policy gradient.

    Ratio: none. Off policy, the importance weight of the caller is the whole correction.

    .. math::

        L_t = -A_t \log\pi_\theta

    Args:
        tokens: ``[T]``.

    Source: Williams 1992, REINFORCE.
    """
    return weighted_reinforce(
        tokens.current_logprobs, tokens.advantages, weights=torch.ones_like(tokens.advantages)
    )


def kimi_squared_log(tokens: LossTokens, *, penalty: float = 0.1) -> TokenLoss:
    r"""Return the policy gradient with a squared penalty on the log ratio, token by token.

    Ratio: proximal. The penalty pulls back from both sides and has no slope at ratio 1. The
    paper squares the log ratio of the whole response; here each token pays for its own.

    .. math::

        L_t = -A_t \log\pi_\theta
              + \frac{b}{2} \big(\log\pi_\theta - \log\pi_{prox}\big)^2

    Args:
        tokens: ``[T]``.
        penalty: b.

    Raises:
        ValueError: if ``penalty`` is negative, which would push the policy away.

    Source: Kimi k1.5 (arXiv 2501.12599), equation 3; DRO (arXiv 2405.19107).
    """
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    squared = (tokens.current_logprobs - tokens.proximal_logprobs) ** 2
    plain = reinforce(tokens)
    return TokenLoss(loss=plain.loss + penalty / 2 * squared, clipped=plain.clipped)
