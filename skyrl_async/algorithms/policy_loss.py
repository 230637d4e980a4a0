"""Decoupled PPO with a truncated importance weight: a pure function on the tokens of the loss.

Shapes: ``T`` is the number of loss tokens of one microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss of one microbatch and what is worth knowing about its tokens.

    Attributes:
        loss: scalar, the *sum* over the tokens; the caller divides by the number of loss tokens of
            the whole batch, so that the value does not depend on how it was split.
        sums: per-token quantities, summed over ``T``; no gradient.
        maxima: per-token quantities, their largest; no gradient.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


def importance_weights(
    proximal_logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float
) -> Tensor:
    r"""Return :math:`w_t = \min(\exp(\log\pi_{prox} - \log\pi_{behav}), cap)`, without gradient.

    Args:
        proximal_logprobs: ``[T]``, of the weights at the start of the step.
        behavior_logprobs: ``[T]``, of the weights that sampled the tokens.
        cap: truncation from above.

    Source: truncated importance sampling (Ionides 2008); per token as in IMPALA (arXiv 1802.01561).
    """
    return (proximal_logprobs - behavior_logprobs).detach().exp().clamp(max=cap)


def decoupled_ppo(
    current_logprobs: Tensor,
    *,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    importance_weight_cap: float,
) -> PolicyLoss:
    r"""Return the decoupled PPO loss, summed over tokens.

    .. math::

        w_t &= \min(\exp(\log\pi_{prox} - \log\pi_{behav}), C) \\
        r_t &= \exp(\log\pi_\theta - \log\pi_{prox}) \\
        L &= -\sum_t w_t \min\big(r_t A_t, \operatorname{clip}(r_t, 1 - \epsilon_{low},
             1 + \epsilon_{high}) A_t\big)

    Args:
        current_logprobs: ``[T]``, of the weights being differentiated.
        proximal_logprobs: ``[T]``, of the weights at the start of the step.
        behavior_logprobs: ``[T]``, of the weights that sampled the tokens.
        advantages: ``[T]``.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        importance_weight_cap: C.

    Raises:
        ValueError: if the shapes differ.

    Source: Hilton et al. 2022 (arXiv 2110.00641); AReaL (arXiv 2505.24298) for language models;
    separate clip ranges from DAPO (arXiv 2503.14476).
    """
    shapes = {tuple(t.shape) for t in (proximal_logprobs, behavior_logprobs, advantages)}
    if shapes != {tuple(current_logprobs.shape)}:
        raise ValueError(f"shapes differ: current {tuple(current_logprobs.shape)}, others {shapes}")
    proximal_logprobs = proximal_logprobs.detach()
    log_ratio = proximal_logprobs - behavior_logprobs
    weight = importance_weights(proximal_logprobs, behavior_logprobs, cap=importance_weight_cap)
    policy_ratio = (current_logprobs - proximal_logprobs).exp()
    clipped_ratio = policy_ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(policy_ratio * advantages, clipped_ratio * advantages)
    with torch.no_grad():
        sums = {
            "importance_weight": weight.sum(),
            "importance_weight_squared": (weight**2).sum(),
            "importance_weight_capped": (log_ratio.exp() > importance_weight_cap).float().sum(),
            "kl_behavior": (log_ratio.exp() - 1 - log_ratio).sum(),
            "clipped": (clipped_ratio * advantages < policy_ratio * advantages).float().sum(),
        }
        maxima = {
            "importance_weight": log_ratio.exp().max()
            if log_ratio.numel()
            else log_ratio.new_zeros(())
        }
    return PolicyLoss(loss=-(weight * objective).sum(), sums=sums, maxima=maxima)
