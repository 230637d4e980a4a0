"""Terms that the objective adds to the policy loss of every token: pure functions.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

from torch import Tensor

from skyrl_async.algorithms.tokens import LossTokens


def squared_log_ratio(tokens: LossTokens) -> Tensor:
    r"""Return ``[T]``: the squared log ratio to the policy that sampled the token.

    .. math::

        R_t = \big(\log\pi_\theta - \log\pi_{behav}\big)^2

    ``algorithm.squared_log_ratio_coefficient`` times this is added to the loss of every token, with
    the token's share but without its importance weight. It also is for those that a trust region
    clipped: they have no other gradient that leads back.

    Args:
        tokens: ``[T]``.

    Source: Kimi K2.5 (arXiv 2602.02276), the second term of its objective; to the start of the step
    in place of the behavior, it is a part of the loss ``kimi_squared_log``.
    """
    return (tokens.current_logprobs - tokens.behavior_logprobs).square()
