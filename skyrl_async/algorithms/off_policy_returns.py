r"""Advantages and value targets corrected for the policy that sampled the tokens: pure functions.

Shapes and notation are those of :mod:`skyrl_async.algorithms.returns`. Added to them are the
importance weights :math:`w_t = \exp(\log\pi - \log\pi_{behav})`, :math:`\pi` being the policy whose
values are wanted.

Nothing here carries a gradient. Results are of the inputs' precision, but at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_async.algorithms.recursion import aligned, discounted_sums, next_in_sequence
from skyrl_async.algorithms.returns import Returns


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    log_importance: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_cap: float = 1.0,
    c_cap: float = 1.0,
    weighted_advantages: bool = True,
    lam_in_advantages: bool = False,
    bootstrap_values: Tensor | None = None,
) -> Returns:
    r"""Return V-trace targets and the advantages that go with them.

    With the importance weights :math:`w_t`, :math:`\rho_t = \min(\bar\rho, w_t)` and
    :math:`c_t = \lambda \min(\bar c, w_t)`:

    .. math::

        v_s &= V_s + \sum_{t \geq s} \gamma^{t-s} \Big(\prod_{i=s}^{t-1} c_i\Big) \rho_t \delta_t \\
        A_t &= \rho_t (R_t + \gamma v_{t+1} - V_t)

    The targets are :math:`v_s`. Where the loss multiplies advantages with an importance weight or a
    ratio to the behavior policy, as a decoupled loss does, take ``weighted_advantages=False``:
    :math:`A_t` without :math:`\rho_t`, which would count twice. With it they are for a loss that
    is :math:`-A_t \log\pi_\theta` and no more, or a ratio to the proximal policy alone.

    On-policy the targets are those of :func:`gae` for every lambda, but the advantages are so for a
    lambda of 1 only: :math:`v_{t+1}` enters them in full. ``lam_in_advantages`` puts
    :math:`(1 - \lambda) V_{t+1} + \lambda v_{t+1}` in its place, and they agree for every lambda.

    Args:
        rewards: ``[T]``.
        values: ``[T]``, of the state before each token.
        sequence_ids: ``[T]``, the sequence of each token.
        log_importance: ``[T]``, log of w: logprob under the policy whose value is wanted (proximal,
            or current) minus behavior_logprobs.
        gamma: discount of a token.
        lam: lambda.
        rho_cap: largest weight of an error; decides which policy's values the targets are.
        c_cap: largest weight of a trace; decides how far back an error reaches. At most rho_cap.
        weighted_advantages: whether the advantages have the factor rho.
        lam_in_advantages: whether the advantages look ahead with lambda.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, the tokens of a sequence are not next to each other, or
            c_cap is above rho_cap.

    Source: IMPALA (Espeholt et al. 2018, arXiv 1802.01561), equation 1, remarks 1 and 2, and
    section 4.2 for the advantages.
    """
    if c_cap > rho_cap:
        raise ValueError(f"c_cap {c_cap} is above rho_cap {rho_cap}")
    rewards, values, weights = aligned(sequence_ids, rewards, values, log_importance)
    weights = weights.exp()
    rho, c = weights.clamp(max=rho_cap), lam * weights.clamp(max=c_cap)
    next_values = next_in_sequence(values, sequence_ids, bootstrap_values)
    deltas = rho * (rewards + gamma * next_values - values)
    targets = values + discounted_sums(deltas, gamma * c, sequence_ids)
    ahead = next_in_sequence(targets, sequence_ids, bootstrap_values)
    if lam_in_advantages:
        ahead = torch.lerp(next_values, ahead, lam)
    advantages = rewards + gamma * ahead - values
    if weighted_advantages:
        advantages = rho * advantages
    return Returns(advantages=advantages, targets=targets)


@torch.no_grad()
def retrace(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    log_importance: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap_values: Tensor | None = None,
) -> Returns:
    r"""Return Retrace advantages and targets, with state values in place of action values.

    With the importance weights :math:`w_t` and :math:`c_t = \lambda \min(1, w_t)`:

    .. math::

        A_t &= \sum_{k \geq t} \gamma^{k-t} \Big(\prod_{i=t+1}^{k} c_i\Big) \delta_k
             = \delta_t + \gamma c_{t+1} A_{t+1} \\
        G_t &= V_t + \min(1, w_t) A_t

    Retrace corrects an action value by :math:`\sum_k \gamma^{k-t} (\prod_{i=t+1}^{k} c_i)\,
    (R_k + \gamma \operatorname{E}_\pi Q(x_{k+1}, \cdot) - Q(x_k, a_k))`. Here both
    :math:`\operatorname{E}_\pi Q(x_k, \cdot)` and :math:`Q(x_k, a_k)` are :math:`V_k`, so that the
    corrected action value is :math:`V_t + A_t`. Its first action is given and has no weight; that
    of a state value is not, hence the weight in the target. The targets are those of :func:`vtrace`
    with both caps 1, the advantages its unweighted ones with ``lam_in_advantages``. With action
    values the fixed point is the value of the wanted policy for any c; with state values it is
    that of the policy that V-trace with a cap of 1 evaluates.

    The advantages have no weight of their own token: the loss applies it.

    Args:
        rewards: ``[T]``.
        values: ``[T]``, of the state before each token.
        sequence_ids: ``[T]``, the sequence of each token.
        log_importance: ``[T]``, log of w: logprob under the policy whose value is wanted (proximal,
            or current) minus behavior_logprobs.
        gamma: discount of a token.
        lam: lambda.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, or the tokens of a sequence are not next to each other.

    Source: Retrace (Munos et al. 2016, arXiv 1606.02647), the general operator with the
    coefficients of Retrace(lambda); the target of a state value from ACER (Wang et al. 2017, arXiv
    1611.01224), equation 14.
    """
    rewards, values, weights = aligned(sequence_ids, rewards, values, log_importance)
    truncated = weights.exp().clamp(max=1.0)
    deltas = rewards + gamma * next_in_sequence(values, sequence_ids, bootstrap_values) - values
    factors = gamma * lam * next_in_sequence(truncated, sequence_ids, None)
    advantages = discounted_sums(deltas, factors, sequence_ids)
    return Returns(advantages=advantages, targets=values + truncated * advantages)
