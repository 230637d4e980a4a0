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

    Args:
        rewards: ``[T]``.
        values: ``[T]``, of the state before each token.
        sequence_ids: ``[T]``, the sequence of each token.
        gamma: discount of a token.
        lam: lambda, one for all tokens or ``[T]``.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, or the tokens of a sequence are not next to each other.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    rewards, values, factors = _aligned(sequence_ids, rewards, values, _spread(lam, values))
    deltas = rewards + gamma * _next(values, sequence_ids, bootstrap_values) - values
    advantages = _discounted_sums(deltas, gamma * factors, sequence_ids)
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
    rewards, values = _aligned(sequence_ids, rewards, values)
    _check_shapes(sequence_ids, turn_ids)
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
def skip_observation_gae(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    action_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_values: Tensor | None = None,
) -> Returns:
    r"""Return generalized advantage estimates over the action tokens of full sequences.

    Observations lie between the actions and are no step of their own. The last token of action i is
    followed by the first of action i + 1, whose value has seen the observation:

    .. math::

        \delta_{i,N} &= R_{i,N} + \gamma V_{i+1,0} - V_{i,N} \\
        A_{i,N} &= \delta_{i,N} + \gamma \lambda A_{i+1,0}

    and within an action as in :func:`gae`. A reward at an observation token is one for the action
    token before it. At observation tokens the advantage is 0 and the target the value itself, so
    that neither the policy nor the critic learns anything there.

    Args:
        rewards: ``[T]``.
        values: ``[T]``; those at observation tokens are not used.
        sequence_ids: ``[T]``, the sequence of each token, observations included.
        action_mask: ``[T]`` bool, the tokens that the policy sampled.
        gamma: discount of an action token.
        lam: lambda, one for all tokens or ``[T]``.
        bootstrap_values: ``[S]``, of the state after each sequence; 0 if not given.

    Raises:
        ValueError: if the shapes differ, the tokens of a sequence are not next to each other, or a
            reward comes before the first action of its sequence.

    Source: SAO (arXiv 2607.07508), skip-observation GAE.
    """
    rewards, values, lambdas = _aligned(sequence_ids, rewards, values, _spread(lam, values))
    _check_shapes(sequence_ids, action_mask)
    action_mask = action_mask.bool()
    of_actions = gae(
        _rewards_of_actions(rewards, sequence_ids, action_mask),
        values[action_mask],
        sequence_ids[action_mask],
        gamma=gamma,
        lam=lambdas[action_mask],
        bootstrap_values=bootstrap_values,
    )
    advantages, targets = torch.zeros_like(values), values.clone()
    advantages[action_mask] = of_actions.advantages
    targets[action_mask] = of_actions.targets
    return Returns(advantages=advantages, targets=targets)


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
    rewards, values, weights = _aligned(sequence_ids, rewards, values, log_importance)
    weights = weights.exp()
    rho, c = weights.clamp(max=rho_cap), lam * weights.clamp(max=c_cap)
    next_values = _next(values, sequence_ids, bootstrap_values)
    deltas = rho * (rewards + gamma * next_values - values)
    targets = values + _discounted_sums(deltas, gamma * c, sequence_ids)
    ahead = _next(targets, sequence_ids, bootstrap_values)
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
    rewards, values, weights = _aligned(sequence_ids, rewards, values, log_importance)
    truncated = weights.exp().clamp(max=1.0)
    deltas = rewards + gamma * _next(values, sequence_ids, bootstrap_values) - values
    factors = gamma * lam * _next(truncated, sequence_ids, None)
    advantages = _discounted_sums(deltas, factors, sequence_ids)
    return Returns(advantages=advantages, targets=values + truncated * advantages)


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
        ValueError: if the shapes differ, or the tokens of a sequence are not next to each other.

    Source: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), token-level returns.
    """
    rewards, kl = _aligned(sequence_ids, rewards, kl)
    return _discounted_sums(rewards - beta * kl, torch.full_like(kl, gamma), sequence_ids)


def _check_shapes(sequence_ids: Tensor, *tensors: Tensor) -> None:
    shapes = {tuple(t.shape) for t in (sequence_ids, *tensors)}
    if len(shapes) > 1 or sequence_ids.ndim != 1:
        raise ValueError(f"tokens need tensors of one shape [T], got {sorted(shapes)}")


def _aligned(sequence_ids: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors ``[T]`` in one float type."""
    _check_shapes(sequence_ids, *tensors)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _spread(lam: float | Tensor, values: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if isinstance(lam, Tensor):
        return lam.to(dtype)
    return torch.full_like(values, lam, dtype=dtype)


def _next(values: Tensor, sequence_ids: Tensor, after_last: Tensor | None) -> Tensor:
    """Return ``[T]``: the value of the next token; ``after_last [S]`` or 0 at a sequence's last."""
    is_last = torch.ones_like(sequence_ids, dtype=torch.bool)
    is_last[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    beyond = values.new_zeros(()) if after_last is None else after_last.to(values)[sequence_ids]
    return torch.where(is_last, beyond, values.roll(-1))


def _rewards_of_actions(rewards: Tensor, sequence_ids: Tensor, action_mask: Tensor) -> Tensor:
    """Return ``[A]``: what each action token earned until the next one."""
    action_ids = sequence_ids[action_mask]
    latest = action_mask.cumsum(0) - 1  # the action token at or before each token, if there is one
    owned = latest >= 0
    owned[owned.clone()] = action_ids[latest[owned]] == sequence_ids[owned]
    if bool((rewards[~owned] != 0).any()):
        raise ValueError("a reward comes before the first action token of its sequence")
    return sequence_sums(rewards[owned], latest[owned], len(action_ids))


def _discounted_sums(terms: Tensor, factors: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return ``[T]``: :math:`y_t = x_t + f_t y_{t+1}` within each sequence, 0 after its last token.

    One step of the loop takes the tokens that are equally far from the end of their sequences.
    """
    if terms.numel() == 0:
        return terms.clone()
    order, counts = _by_distance_to_end(sequence_ids)
    first, *terms_later = torch.split(terms[order], counts)
    _, *factors_later = torch.split(factors[order], counts)
    sums: list[Tensor] = [first]
    for term, factor in zip(terms_later, factors_later, strict=True):
        sums.append(torch.addcmul(term, factor, sums[-1][: len(term)]))
    result = torch.empty_like(terms)
    result[order] = torch.cat(sums)
    return result


def _by_distance_to_end(sequence_ids: Tensor) -> tuple[Tensor, list[int]]:
    """Return the tokens by distance to their sequence's end, and how many there are of each.

    Those of one distance are in the order of their sequences' lengths, the longest first: the
    sequences that go on to the next distance are then a prefix of those that reached this one.
    """
    present, lengths = torch.unique_consecutive(sequence_ids, return_counts=True)
    if len(present.unique()) != len(present):
        raise ValueError("the tokens of a sequence must be next to each other")
    rank = lengths.argsort(descending=True, stable=True).argsort()
    steps = torch.arange(len(sequence_ids), device=sequence_ids.device)
    distance = (lengths.cumsum(0) - 1).repeat_interleave(lengths) - steps
    counts = torch.bincount(distance)
    order = torch.empty_like(steps)
    order[(counts.cumsum(0) - counts)[distance] + rank.repeat_interleave(lengths)] = steps
    return order, counts.tolist()
