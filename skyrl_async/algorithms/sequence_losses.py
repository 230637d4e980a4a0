"""Policy losses with one ratio for a whole sequence: pure functions.

The value of every token is that of its sequence, or its share of it; its gradient goes to the
logprob of that token alone. Advantages may differ within a sequence; where they do not, the
aggregate named by each loss is the objective of its paper, with its gradient.

A sequence must be whole: all its loss tokens, in one ``LossTokens``. Shapes: ``T`` loss tokens,
``S`` sequences.
"""

from __future__ import annotations

import torch

from skyrl_async.algorithms.clipping import (
    clipped_surrogate,
    finite_exp,
    weighted_reinforce,
    with_slopes,
)
from skyrl_async.algorithms.tokens import LossTokens, TokenLoss


def gspo(tokens: LossTokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenLoss:
    r"""Return the clipped surrogate with the length-normalized ratio of the sequence.

    Ratio: proximal. A sequence is clipped as one. The mean over its tokens is the objective of
    the paper.

    .. math::

        s_i &= \exp\Big(\frac{1}{|y_i|} \sum_{t=1}^{|y_i|}
               (\log\pi_\theta - \log\pi_{prox})_{i,t}\Big) \\
        s_{i,t} &= \operatorname{sg}(s_i)\, \frac{\pi_\theta}{\operatorname{sg}(\pi_\theta)} \\
        L_{i,t} &= -\min\big(s_{i,t} A_{i,t}, \operatorname{clip}(s_{i,t},
                   1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_{i,t}\big)

    Args:
        tokens: ``[T]``, of whole sequences.
        clip_low: epsilon below 1; far smaller than for ratios of tokens.
        clip_high: epsilon above 1.

    Raises:
        ValueError: if the clip range is no interval around 1.

    Source: GSPO (arXiv 2507.18071), equation 5, in the form of its section on GSPO-token.
    """
    log_ratio = (tokens.current_logprobs - tokens.proximal_logprobs).detach()
    own_gradient = tokens.current_logprobs - tokens.current_logprobs.detach()
    return clipped_surrogate(
        tokens.spread(tokens.means(log_ratio)) + own_gradient,
        tokens.advantages,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def gmpo(tokens: LossTokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenLoss:
    r"""Return the surrogate with the geometric mean of the clipped ratios of the tokens.

    Ratio: proximal. Tokens are clipped on the outward side only, in logarithms, before the mean;
    a clipped token lends its bound to the mean and has no gradient. The mean over the tokens of
    a sequence is the objective of the paper.

    .. math::

        c_{i,t} &= \begin{cases} \min(\log r_{i,t}, \epsilon_{high}) & A_{i,t} > 0 \\
                   \max(\log r_{i,t}, -\epsilon_{low}) & A_{i,t} < 0 \end{cases} \\
        g_i &= \exp\Big(\frac{1}{|y_i|} \sum_{t=1}^{|y_i|} c_{i,t}\Big) \\
        L_{i,t} &= -\operatorname{sg}(g_i)\,
                   \frac{e^{c_{i,t}}}{\operatorname{sg}(e^{c_{i,t}})}\, A_{i,t}

    Args:
        tokens: ``[T]``, of whole sequences.
        clip_low: epsilon of the log ratio below 0.
        clip_high: epsilon of the log ratio above 0.

    Raises:
        ValueError: if a clip range is negative.

    Source: GMPO (arXiv 2507.20673), the objective with token-level clipping.
    """
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    with torch.no_grad():
        log_ratio = tokens.current_logprobs - tokens.proximal_logprobs
        above = (tokens.advantages > 0) & (log_ratio > clip_high)
        below = (tokens.advantages < 0) & (log_ratio < -clip_low)
        clipped = above | below
        bounded = log_ratio.masked_fill(above, clip_high).masked_fill(below, -clip_low)
        surrogate = tokens.spread(finite_exp(tokens.means(bounded))) * tokens.advantages
        slopes = surrogate * ~clipped
    loss = -with_slopes(surrogate, slopes, tokens.current_logprobs)
    return TokenLoss(loss=loss, clipped=clipped)


def vespo(
    tokens: LossTokens,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> TokenLoss:
    r"""Return the policy gradient weighted by a soft kernel of the sequence's importance weight.

    Ratio: behavior, as the product over the sequence, not normalized by its length. The kernel is
    1 at W = 1, fades like a power below and exponentially above; no token is clipped. The *sum*
    over the tokens of a sequence has the gradient of the paper.

    .. math::

        W_i &= \prod_{t=1}^{|y_i|} \Big(\frac{\pi_\theta}{\pi_{behav}}\Big)_{i,t} \\
        \varphi(W) &= W^k e^{\lambda (1 - W)} \\
        L_{i,t} &= -\operatorname{sg}\big(\varphi(W_i)\big) A_{i,t} \log\pi_\theta

    with k and :math:`\lambda` of the sign of the advantage.

    Args:
        tokens: ``[T]``, of whole sequences.
        k_positive: k for positive advantages.
        lambda_positive: lambda for positive advantages.
        k_negative: k for negative advantages.
        lambda_negative: lambda for negative advantages.

    Raises:
        ValueError: if one of them is not positive: the kernel would not fade on that side.

    Source: VESPO (arXiv 2602.10693), the kernel and its policy loss.
    """
    options = (
        ("k_positive", k_positive),
        ("lambda_positive", lambda_positive),
        ("k_negative", k_negative),
        ("lambda_negative", lambda_negative),
    )
    for name, value in options:
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    log_ratio = (tokens.current_logprobs - tokens.behavior_logprobs).detach()
    log_weights = tokens.sums(log_ratio)
    # An infinite W is harmless in this form: the exponent is minus infinity.
    positive, negative = (
        tokens.spread((k * log_weights + lam * (1 - log_weights.exp())).exp())
        for k, lam in ((k_positive, lambda_positive), (k_negative, lambda_negative))
    )
    kernel = torch.where(tokens.advantages < 0, negative, positive)
    return weighted_reinforce(tokens.current_logprobs, tokens.advantages, weights=kernel)


def topr(tokens: LossTokens) -> TokenLoss:
    r"""Return the policy gradient that tapers bad sequences which became unlikely.

    Ratio: behavior, as the product over the sequence. Good tokens learn with weight 1 however far
    the policy moved, bad ones less the more the policy avoids their sequence already. The *sum*
    over the tokens of a sequence has the gradient of the paper.

    .. math::

        L_{i,t} = -\alpha_{i,t} A_{i,t} \log\pi_\theta, \qquad
        \alpha_{i,t} = \begin{cases} 1 & A_{i,t} > 0 \\
            \operatorname{sg}\Big(\min\big(\prod_{u=1}^{|y_i|}
            (\pi_\theta / \pi_{behav})_{i,u},\, 1\big)\Big) & A_{i,t} \le 0 \end{cases}

    Args:
        tokens: ``[T]``, of whole sequences.

    Source: TOPR (arXiv 2503.14286), the update with the advantage for the reward.
    """
    log_ratio = (tokens.current_logprobs - tokens.behavior_logprobs).detach()
    weights = tokens.spread(tokens.sums(log_ratio).clamp(max=0.0).exp())
    weights = weights.masked_fill(tokens.advantages > 0, 1.0)
    return weighted_reinforce(tokens.current_logprobs, tokens.advantages, weights=weights)
