r"""Advantages and value targets of tokens or turns, from rewards and values: pure functions.

Shapes: ``T`` tokens of whole sequences, end to end, ``S`` sequences. As in
:class:`skyrl_async.algorithms.tokens.LossTokens`, ``sequence_ids [T]`` names the sequence of each
token, and a sequence's tokens are in order and next to each other; sequences without tokens are
simply not there.

Notation: :math:`R_t` is the reward of token t, usually 0 but at the last token of a sequence, and
:math:`V_t` the value of the state before it. The value after the last token of a sequence is 0, the
sequence having ended there, or its entry of ``bootstrap_values [S]`` if it was merely cut off. A
one-step error is :math:`\delta_t = R_t + \gamma V_{t+1} - V_t`.

Nothing here carries a gradient. Results are of the inputs' precision, but at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_async.algorithms.recursion import (
    aligned,
    check_shapes,
    discounted_sums,
    next_in_sequence,
)
from skyrl_async.algorithms.reward_shaping import kl_in_reward
from skyrl_async.algorithms.tokens import sequence_sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Returns:
    """What the policy and the critic learn from; both ``[T]``, without gradient.

    Attributes:
        advantages: of the tokens, for the policy.
        targets: what the critic should have predicted before each token.
    """

    advantages: Tensor
    targets: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_values: Tensor | None = None,
) -> Returns:
    r"""Return generalized advantage estimates, one step per token.

    .. math::

        A_t = \sum_{l \geq 0} \Big(\prod_{i=t}^{t+l-1} \gamma \lambda_i\Big) \delta_{t+l}
            = \delta_t + \gamma \lambda_t A_{t+1}, \qquad
        G_t = A_t + V_t

    On the sampled tokens alone, as the learner has them, this skips observations: what another
    party wrote between two replies is no step, and the token after the last one of a reply is the
    first one of the next, whose value has seen what lies between.

    Args:
        rewards: ``[T]``.
        values: ``[T]``, of the state before each token.
        sequence_ids: ``[T]``, the sequence of each token.
        gamma: discount of a token.
        lam: lambda, one for all tokens or ``[T]``.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, or the tokens of a sequence are not next to each other.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16; skipping observations: SAO
    (arXiv 2607.07508).
    """
    rewards, values, factors = aligned(sequence_ids, rewards, values, _spread(lam, values))
    deltas = rewards + gamma * next_in_sequence(values, sequence_ids, bootstrap_values) - values
    advantages = discounted_sums(deltas, gamma * factors, sequence_ids)
    return Returns(advantages=advantages, targets=advantages + values)


@torch.no_grad()
def length_adaptive_lambdas(
    sequence_ids: Tensor, num_sequences: int, *, alpha: float = 0.05
) -> Tensor:
    r"""Return the lambda of each token, the closer to 1 the longer its sequence.

    .. math::

        \lambda_t = \operatorname{clip}\Big(1 - \frac{1}{\alpha L_{s(t)}}, 0, 1\Big)

    The lambdas of a sequence then weigh its errors by :math:`\alpha L` in total. They are for the
    policy alone; the critic keeps a lambda of 1, whose targets are the observed returns. That takes
    two calls: ``gae(..., lam=length_adaptive_lambdas(...)).advantages`` for the policy, and
    ``gae(..., lam=1.0).targets`` for the critic.

    Args:
        sequence_ids: ``[T]``, the sequence of each token.
        num_sequences: S.
        alpha: share of its length over which a sequence spreads credit. Sequences of
            :math:`1 / \alpha` tokens and less get a lambda of 0.

    Returns:
        ``[T]`` float64.

    Raises:
        ValueError: if alpha is not positive.

    Source: VAPO (Yue et al. 2025, arXiv 2504.05118), length-adaptive and decoupled GAE.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    ones = torch.ones_like(sequence_ids, dtype=torch.float64)
    lengths = sequence_sums(ones, sequence_ids, num_sequences)[sequence_ids]
    return (1 - 1 / (alpha * lengths)).clamp(0, 1)


def turn_starts(sequence_ids: Tensor, turn_ids: Tensor) -> Tensor:
    """Return ``[T]`` bool: the first token of each turn.

    Args:
        sequence_ids: ``[T]``, the sequence of each token.
        turn_ids: ``[T]``, the turn of each token; different for turns that follow each other.
    """
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[1:] = (sequence_ids[1:] != sequence_ids[:-1]) | (turn_ids[1:] != turn_ids[:-1])
    return starts


@torch.no_grad()
def turn_level_gae(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    turn_ids: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
) -> Returns:
    r"""Return generalized advantage estimates, one step per turn.

    For turn i, its reward :math:`R_i` the sum over its tokens and its value :math:`V_i` that of
    the state before its first token:

    .. math::

        \delta_i = R_i + \gamma V_{i+1} - V_i, \qquad
        A_i = \delta_i + \gamma \lambda A_{i+1}, \qquad
        G_i = A_i + V_i

    Every token of a turn gets the turn's advantage and target. The target is that of the turn's
    first token, though: a critic learns from the tokens where :func:`turn_starts` is true, since
    the states before the others lie within the turn.

    Args:
        rewards: ``[T]``.
        values: ``[T]``; used at the first token of each turn.
        sequence_ids: ``[T]``, the sequence of each token.
        turn_ids: ``[T]``, the turn of each token; different for turns that follow each other.
        gamma: discount of a turn.
        lam: lambda.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, or the tokens of a sequence are not next to each other.

    Source: GAE (arXiv 1506.02438), equation 16, with turns as the actions.
    """
    rewards, values = aligned(sequence_ids, rewards, values)
    check_shapes(sequence_ids, turn_ids)
    starts = turn_starts(sequence_ids, turn_ids)
    turns = starts.cumsum(0) - 1
    of_turns = gae(
        sequence_sums(rewards, turns, int(starts.sum())),
        values[starts],
        sequence_ids[starts],
        gamma=gamma,
        lam=lam,
        bootstrap_values=bootstrap_values,
    )
    return Returns(advantages=of_turns.advantages[turns], targets=of_turns.targets[turns])


@torch.no_grad()
def reinforce_plus_plus_returns(
    rewards: Tensor, kl: Tensor, sequence_ids: Tensor, *, beta: float, gamma: float = 1.0
) -> Tensor:
    r"""Return ``[T]``: the rewards to come, each token's KL penalty taken off.

    .. math::

        G_t = \sum_{k \geq t} \gamma^{k-t} (R_k - \beta\, \mathrm{KL}_k)
            = R - \beta \sum_{k \geq t} \mathrm{KL}_k

    the latter for a reward R at the last token and a discount of 1. Whitening over the tokens of
    the whole batch is left to the caller.

    Args:
        rewards: ``[T]``.
        kl: ``[T]``, estimate of the divergence from the reference policy at each token; that of the
            source is the difference of the logprobs.
        sequence_ids: ``[T]``, the sequence of each token.
        beta: weight of the penalty.
        gamma: discount of a token.

    Raises:
        ValueError: if the shapes differ, the tokens of a sequence are not next to each other, or
            beta is negative.

    Source: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), token-level returns.
    """
    rewards, kl = aligned(sequence_ids, rewards, kl)
    shaped = kl_in_reward(rewards, kl, coefficient=beta)
    return discounted_sums(shaped, torch.full_like(kl, gamma), sequence_ids)


def _spread(lam: float | Tensor, values: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if isinstance(lam, Tensor):
        return lam.to(dtype)
    return torch.full_like(values, lam, dtype=dtype)
