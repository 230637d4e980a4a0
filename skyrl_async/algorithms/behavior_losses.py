r"""Token-level policy losses against the policy that sampled the tokens: pure functions.

Their ratio is :math:`w_t = \exp(\log\pi_\theta - \log\pi_{behav})`. It holds the whole distance
from the engine at sampling to the weights being differentiated, so that these losses are complete
without an importance weight, and without logprobs of the start of the step.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_async.algorithms.clipping import (
    check_cap,
    check_clip_range,
    clipped_surrogate,
    masked_surrogate,
    weighted_reinforce,
)
from skyrl_async.algorithms.tokens import LossTokens, TokenLoss

_FEW = 512
"""Squares that are sorted rather than divided further."""


def ppo_behavior(
    tokens: LossTokens, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> TokenLoss:
    r"""Return the clipped surrogate of PPO with the engine's logprobs as the old policy.

    Ratio: behavior. On stale tokens, those clipped from the first update of a step on learn
    nothing in it.

    .. math::

        L_t = -\min\big(w_t A_t,
              \operatorname{clip}(w_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t\big)

    Args:
        tokens: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.

    Raises:
        ValueError: if the clip range is no interval around 1.

    Source: PPO (arXiv 1707.06347), equation 7.
    """
    return clipped_surrogate(
        tokens.current_logprobs - tokens.behavior_logprobs,
        tokens.advantages,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def reinforce_is(tokens: LossTokens, *, cap: float = 2.0) -> TokenLoss:
    r"""Return the policy gradient with a truncated importance weight.

    Ratio: behavior. Every token keeps its gradient.

    .. math::

        L_t = -\operatorname{sg}\big(\min(w_t, C)\big) A_t \log\pi_\theta

    Args:
        tokens: ``[T]``.
        cap: C, at least 1.

    Raises:
        ValueError: if ``cap`` is below 1.

    Source: truncated importance sampling (Ionides 2008); per token as in IMPALA
    (arXiv 1802.01561).
    """
    check_cap(cap)
    ratio = (tokens.current_logprobs - tokens.behavior_logprobs).detach().exp()
    return weighted_reinforce(
        tokens.current_logprobs, tokens.advantages, weights=ratio.clamp(max=cap)
    )


def aipo(tokens: LossTokens, *, cap: float = 10.0) -> TokenLoss:
    r"""Return ``reinforce_is`` under the name and with the wide cap of LlamaRL.

    Ratio: behavior.

    .. math::

        L_t = -\operatorname{sg}\big(\min(w_t, \rho)\big) A_t \log\pi_\theta

    Args:
        tokens: ``[T]``.
        cap: rho, 2 to 10 in the paper.

    Raises:
        ValueError: if ``cap`` is below 1.

    Source: LlamaRL (arXiv 2505.24034), the update of AIPO.
    """
    return reinforce_is(tokens, cap=cap)


def dppo_tv(tokens: LossTokens, *, delta_low: float = 0.2, delta_high: float = 0.2) -> TokenLoss:
    r"""Return the surrogate of the tokens whose probability moved little in absolute terms.

    Ratio: behavior. The trust region is on the total variation of the binary choice "this token
    or another", not on the ratio: rare tokens may change by large factors, frequent ones by
    little. With p and :math:`\mu` the probabilities of the token now and at sampling:

    .. math::

        M_t &= \begin{cases}
            0 & A_t > 0,\; p_t - \mu_t > \delta_{high} \\
            0 & A_t < 0,\; p_t - \mu_t < -\delta_{low} \\
            1 & \text{otherwise} \end{cases} \\
        L_t &= -M_t w_t A_t

    Args:
        tokens: ``[T]``.
        delta_low: how far a probability may fall.
        delta_high: how far it may rise.

    Raises:
        ValueError: if a delta is outside 0 .. 1.

    Source: DPPO, binary total variation (arXiv 2602.04879).
    """
    for name, delta in (("delta_low", delta_low), ("delta_high", delta_high)):
        if not 0 <= delta <= 1:
            raise ValueError(f"{name} must be in 0 .. 1, got {delta}")
    log_ratio = tokens.current_logprobs - tokens.behavior_logprobs
    with torch.no_grad():
        moved = tokens.current_logprobs.exp() - tokens.behavior_logprobs.exp()
        too_high = (tokens.advantages > 0) & (moved > delta_high)
        too_low = (tokens.advantages < 0) & (moved < -delta_low)
    return masked_surrogate(log_ratio, tokens.advantages, too_high | too_low)


def dppo_kl(tokens: LossTokens, *, delta_low: float = 0.05, delta_high: float = 0.05) -> TokenLoss:
    r"""Return the surrogate of the tokens whose binary KL divergence is small.

    Ratio: behavior. As ``dppo_tv``, with the divergence of the two-outcome distributions "this
    token or another", from sampling to now:

    .. math::

        D_t &= \mu_t \log\frac{\mu_t}{p_t} + (1 - \mu_t) \log\frac{1 - \mu_t}{1 - p_t} \\
        M_t &= \begin{cases}
            0 & A_t > 0,\; p_t > \mu_t,\; D_t > \delta_{high} \\
            0 & A_t < 0,\; p_t < \mu_t,\; D_t > \delta_{low} \\
            1 & \text{otherwise} \end{cases} \\
        L_t &= -M_t w_t A_t

    Args:
        tokens: ``[T]``.
        delta_low: divergence allowed to tokens that became less likely.
        delta_high: divergence allowed to those that became more likely.

    Raises:
        ValueError: if a delta is negative.

    Source: DPPO, binary KL (arXiv 2602.04879).
    """
    for name, delta in (("delta_low", delta_low), ("delta_high", delta_high)):
        if not delta >= 0:
            raise ValueError(f"{name} must be at least 0, got {delta}")
    log_ratio = tokens.current_logprobs - tokens.behavior_logprobs
    with torch.no_grad():
        divergence = _binary_kl(tokens.behavior_logprobs, tokens.current_logprobs, log_ratio)
        too_high = (tokens.advantages > 0) & (log_ratio > 0) & (divergence > delta_high)
        too_low = (tokens.advantages < 0) & (log_ratio < 0) & (divergence > delta_low)
    return masked_surrogate(log_ratio, tokens.advantages, too_high | too_low)


def _binary_kl(from_logprobs: Tensor, to_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """Return the KL divergence of "this token or another", with ``to - from`` given.

    It is infinite where the other vanished, and NaN, which exceeds no limit, where there was none
    and is none.
    """
    # Rounding may leave a logprob above 0; "another" then has probability 0, not less.
    from_other = torch.expm1(from_logprobs).clamp_(max=0).abs_()
    to_other = torch.expm1(to_logprobs).clamp_(max=0).abs_()
    # 0 times the logarithm of the smallest number is 0.
    other_part = torch.div(from_other, to_other, out=to_other)
    other_part.clamp_(min=torch.finfo(from_other.dtype).tiny).log_().mul_(from_other)
    token_part = from_other.sub_(1).mul_(log_ratio)
    return token_part.add_(other_part)


@torch.no_grad()
def m2_mask(log_ratios: Tensor, advantages: Tensor, *, limit: float = 0.04) -> Tensor:
    r"""Return which tokens to keep so that the second moment of the log ratios is bounded.

    Only tokens that an update would push further away count: those with A > 0 and w > 1, or
    A < 0 and w < 1. Of these, the ones with the largest :math:`\log^2 w` are dropped until

    .. math::

        \frac{1}{|K|} \sum_{t \in K} \log^2 w_t \le \tau

    holds for the K that remain. All other tokens are kept. The bound is on the mean over a batch,
    so a mask of one minibatch is not the union of masks of its parts.

    Args:
        log_ratios: ``[T]``, log w, of a whole minibatch.
        advantages: ``[T]``.
        limit: tau.

    Returns:
        ``[T]`` bool, true for tokens to keep.

    Raises:
        ValueError: if ``limit`` is negative.

    Source: M2PO (arXiv 2510.01161), algorithm 1.
    """
    if not limit >= 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    pushed = advantages * log_ratios.sign() > 0
    squares = log_ratios.double().square().mul_(pushed)
    count = pushed.count_nonzero()
    if squares.sum() <= limit * count:
        return torch.ones_like(pushed)
    # A square up to the limit cannot raise a mean above it, so only larger ones are in doubt.
    doubtful = squares > limit
    smallest, num_kept = _smallest_dropped(
        squares[doubtful],
        limit=limit,
        base_sum=(squares * ~doubtful).sum(),
        base_count=count - doubtful.count_nonzero(),
    )
    kept = squares < smallest
    if num_kept:
        kept[(squares == smallest).nonzero()[:num_kept]] = True
    return kept


def _smallest_dropped(
    squares: Tensor, *, limit: float, base_sum: Tensor, base_count: Tensor
) -> tuple[Tensor, int]:
    """Return the smallest square that has to go, and how many of the same size may stay.

    Squares are sorted only once few are in doubt; until then each round settles by their mean
    whether the smaller ones all stay or the larger ones all go.

    Args:
        squares: ``[D]``, some of which have to go.
        limit: of the mean of what stays.
        base_sum: scalar, of what stays in any case.
        base_count: scalar, likewise.
    """
    while len(squares) > _FEW:
        small = squares <= squares.mean()
        # Equal ones may all lie on one side of their rounded mean.
        if small.all() or not small.any():
            break
        total, count = base_sum + (squares * small).sum(), base_count + small.count_nonzero()
        if total <= limit * count:
            base_sum, base_count = total, count
            small = ~small
        squares = squares[small]
    ascending = squares.sort().values
    counts = torch.arange(1, len(squares) + 1, device=squares.device) + base_count
    beyond = (ascending.cumsum(0) + base_sum) / counts > limit
    # The whole sum may have exceeded the limit by its rounding alone.
    beyond[-1] = True
    smallest = ascending[beyond.to(torch.uint8).argmax()]
    return smallest, int((~beyond & (ascending == smallest)).count_nonzero())


def m2po(tokens: LossTokens, *, limit: float = 0.04, kept: Tensor | None = None) -> TokenLoss:
    r"""Return the surrogate of the tokens that the bound on the second moment keeps.

    Ratio: behavior.

    .. math::

        L_t = -M_t w_t A_t

    Args:
        tokens: ``[T]``.
        limit: tau of ``m2_mask``, here on these tokens alone.
        kept: ``[T]`` bool, M, where the mask of a larger batch is known; ``limit`` is unused then.

    Raises:
        ValueError: if ``limit`` is negative.

    Source: M2PO (arXiv 2510.01161).
    """
    log_ratio = tokens.current_logprobs - tokens.behavior_logprobs
    if kept is None:
        kept = m2_mask(log_ratio, tokens.advantages, limit=limit)
    return masked_surrogate(log_ratio, tokens.advantages, ~kept)


def double_sided(tokens: LossTokens, *, clip_low: float = 0.8, clip_high: float = 3.0) -> TokenLoss:
    r"""Return importance sampling that drops tokens outside an interval, whatever their sign.

    Ratio: behavior. Direct double-sided importance sampling: unlike in PPO, a token outside has no
    gradient even where it would lead back.

    .. math::

        f(w) &= \begin{cases} w & 1 - \epsilon_{low} < w < 1 + \epsilon_{high} \\
                0 & \text{otherwise} \end{cases} \\
        L_t &= -\operatorname{sg}\big(f(w_t)\big) A_t \log\pi_\theta

    Args:
        tokens: ``[T]``.
        clip_low: epsilon below 1; 0.8 for coding agents, 0.3 for reasoning with tools.
        clip_high: epsilon above 1; 3 and 5 in the same order.

    Raises:
        ValueError: if the clip range is no interval around 1.

    Source: GLM-5 (arXiv 2602.15763), equations 3 to 5; values from SAO (arXiv 2607.07508).
    """
    check_clip_range(clip_low, clip_high)
    ratio = (tokens.current_logprobs - tokens.behavior_logprobs).detach().exp()
    dropped = (ratio <= 1 - clip_low) | (ratio >= 1 + clip_high)
    return weighted_reinforce(
        tokens.current_logprobs,
        tokens.advantages,
        weights=ratio.masked_fill(dropped, 0.0),
        clipped=dropped,
    )


def topr_token(tokens: LossTokens) -> TokenLoss:
    r"""Return the policy gradient that tapers tokens of negative advantage, each by its own ratio.

    Ratio: behavior. ``topr`` tapers by the ratio of the sequence, as the paper does; per token,
    long sequences of negative advantage keep a weight.

    .. math::

        L_t = -\alpha_t A_t \log\pi_\theta, \qquad
        \alpha_t = \begin{cases} 1 & A_t > 0 \\
                   \operatorname{sg}\big(\min(w_t, 1)\big) & A_t \le 0 \end{cases}

    Args:
        tokens: ``[T]``.

    Source: TOPR (arXiv 2503.14286), with the ratio of the token for that of the trajectory.
    """
    ratio = (tokens.current_logprobs - tokens.behavior_logprobs).detach().exp()
    weights = ratio.clamp(max=1.0).masked_fill(tokens.advantages > 0, 1.0)
    return weighted_reinforce(tokens.current_logprobs, tokens.advantages, weights=weights)
