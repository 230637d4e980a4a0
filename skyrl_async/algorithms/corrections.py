r"""Off-policy corrections: importance weights and rejection masks from log ratios of tokens.

Every function takes ``log_ratios [T]``, proximal minus behavior logprobs, whose exponential is the
importance weight :math:`\rho_t`; nothing here has gradient. Masks are bool ``[T]``, true where a
token is kept.

A rejected token also leaves the denominators of the loss: aggregation counts only kept tokens,
sequences and prompts. Were it to stay there with a loss of zero, every rejection would shrink the
step, as if stale data lowered the learning rate. Rejection does not shorten the trajectory,
however: products, means and sums over a sequence are over all of its tokens with a valid logprob.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from skyrl_async.algorithms import kl
from skyrl_async.algorithms.tokens import sequence_means, sequence_sums

WeightKind = Literal["none", "token", "sequence", "geometric"]
RejectionLevel = Literal["token", "sequence_mean", "sequence_sum", "sequence_max"]

_ROUNDING = 1e-4


def token_weights(log_ratios: Tensor, *, cap: float) -> Tensor:
    r"""Return truncated importance weights of single tokens, ``[T]``.

    .. math:: w_t = \min(\rho_t, C)

    Args:
        log_ratios: ``[T]``.
        cap: C; infinite for none.

    Source: Ionides 2008; per token as in IMPALA (arXiv 1802.01561), equation 1.
    """
    return log_ratios.detach().exp().clamp(max=cap)


def sequence_weights(
    log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int, *, cap: float
) -> Tensor:
    r"""Return the truncated importance weight of each token's sequence, ``[T]``.

    .. math:: w_t = \min\Big(\prod_{u \in i(t)} \rho_u, C\Big)

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        cap: C; infinite for none.

    Source: truncated importance sampling (Ionides 2008) over trajectories.
    """
    sums = sequence_sums(log_ratios.detach(), sequence_ids, num_sequences)
    return sums.exp().clamp(max=cap).index_select(0, sequence_ids)


def geometric_weights(
    log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int, *, cap: float
) -> Tensor:
    r"""Return the truncated geometric mean of each token's sequence, ``[T]``.

    .. math:: w_t = \min\Big(\exp\big(\operatorname{mean}_{u \in i(t)} \log \rho_u\big), C\Big)

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        cap: C; infinite for none.

    Source: the length-normalized sequence ratio of GSPO (arXiv 2507.18071), equation 7, between
    proximal and behavior policy.
    """
    means = sequence_means(log_ratios.detach(), sequence_ids, num_sequences)
    return means.exp().clamp(max=cap).index_select(0, sequence_ids)


def normalize_weights(weights: Tensor) -> Tensor:
    r"""Return weights with mean 1 over the tokens given; zeros stay zeros.

    .. math:: \bar w_t = w_t \Big/ \frac{1}{T} \sum_u w_u

    Args:
        weights: ``[T]``, non-negative, of every kept token of the minibatch.

    Source: self-normalized importance sampling (Owen 2013, Monte Carlo theory, section 9.2).
    """
    return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)


def finite_mask(behavior_logprobs: Tensor) -> Tensor:
    r"""Return where a behavior logprob can be one: finite and not positive, bool ``[T]``.

    .. math:: M_t = [\, -\infty < \log\pi_{behav} \le 0 \,]

    the upper bound up to rounding, of 1e-4. The learner applies it to all tokens before anything
    else, whatever the configuration.

    Args:
        behavior_logprobs: ``[T]``, as the engine reported them.

    Source: the definition of a logarithm of a probability above zero.
    """
    return behavior_logprobs.isfinite() & (behavior_logprobs <= _ROUNDING)


def token_mask(log_ratios: Tensor, *, low: float, high: float) -> Tensor:
    r"""Keep tokens whose ratio lies within an interval.

    .. math:: M_t = [\, l \le \rho_t \le h \,]

    Args:
        log_ratios: ``[T]``.
        low: l, may be 0.
        high: h, may be infinite.

    Source: IcePop (Ring-1T, arXiv 2510.18855).
    """
    return _within(log_ratios, low=low, high=high)


def sequence_mask(
    log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int, *, low: float, high: float
) -> Tensor:
    r"""Keep sequences whose product of ratios lies within an interval.

    .. math:: M_t = \Big[\, l \le \prod_{u \in i(t)} \rho_u \le h \,\Big]

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        low: l, may be 0.
        high: h, may be infinite.

    Source: masked importance sampling of sequences (Liu, Li et al. 2025, "When Speed Kills
    Stability", richardli.xyz/rl-collapse).
    """
    sums = sequence_sums(log_ratios, sequence_ids, num_sequences)
    return _within(sums, low=low, high=high).index_select(0, sequence_ids)


def geometric_mask(
    log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int, *, low: float, high: float
) -> Tensor:
    r"""Keep sequences whose geometric mean of ratios lies within an interval, whatever the length.

    .. math:: M_t = \Big[\, l \le \exp\big(\operatorname{mean}_{u \in i(t)} \log\rho_u\big)
              \le h \,\Big]

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        low: l, may be 0; a mean over many tokens is narrow, for example 0.999.
        high: h, may be infinite; for example 1.001.

    Source: as ``sequence_mask``, with the geometric mean in place of the product.
    """
    means = sequence_means(log_ratios, sequence_ids, num_sequences)
    return _within(means, low=low, high=high).index_select(0, sequence_ids)


def veto_mask(
    log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int, *, below: float
) -> Tensor:
    r"""Reject a whole sequence if the ratio of any of its tokens is too small.

    .. math:: M_t = \Big[\, \min_{u \in i(t)} \rho_u \ge v \,\Big]

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        below: v, for example 1e-4.

    Source: as ``sequence_mask``.
    """
    guilty = sequence_ids[~(log_ratios >= math.log(below))]
    innocent = torch.ones(num_sequences, dtype=torch.bool, device=sequence_ids.device)
    return innocent.index_fill_(0, guilty, False).index_select(0, sequence_ids)


def k2_mask(
    log_ratios: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    limit: float,
    level: RejectionLevel = "token",
) -> Tensor:
    r"""Keep what the K2 divergence between proximal and behavior policy does not exceed.

    .. math:: k_2 = \tfrac12 (\log\rho_t)^2

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        limit: the largest value kept.
        level: judge each token by its own value, or whole sequences by mean, sum or largest.

    Source: Schulman 2020 (joschu.net/blog/kl-approx.html); rejection by the largest token in
    Trust Region Masking (arXiv 2512.23075).
    """
    values = kl.k2(log_ratios)
    return _at_most(values, sequence_ids, num_sequences, limit=limit, level=level)


def k3_mask(
    log_ratios: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    limit: float,
    level: RejectionLevel = "token",
) -> Tensor:
    r"""Keep what the K3 divergence between proximal and behavior policy does not exceed.

    .. math:: k_3 = \rho_t - 1 - \log\rho_t

    Args:
        log_ratios: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        limit: the largest value kept; 0.001 to 0.01 for means over sequences.
        level: judge each token by its own value, or whole sequences by mean, sum or largest.

    Source: as ``k2_mask``.
    """
    # The tokens are of the behavior policy, so the ratio that K3 takes is behavior over proximal.
    return _at_most(kl.k3(-log_ratios), sequence_ids, num_sequences, limit=limit, level=level)


def opsm_mask(
    log_ratios: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    delta: float,
) -> Tensor:
    r"""Reject tokens of negative advantage in sequences that have become unlikely.

    .. math:: M_t = 1 - \Big[\, A_t < 0 \;\wedge\; \operatorname{mean}_{u \in i(t)}
              \log\frac{\pi_{behav}}{\pi_{prox}} > \delta \,\Big]

    The paper's old policy is the engine's, at sampling; its current policy is here that of the
    start of the step, so that mask and denominators hold for the whole step.

    Args:
        log_ratios: ``[T]``.
        advantages: ``[T]``; of one sign within a sequence, they reject it whole.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        delta: nats per token.

    Source: off-policy sequence masking, DeepSeek-V3.2 (arXiv 2512.02556), equation 9.
    """
    far = -sequence_means(log_ratios, sequence_ids, num_sequences) > delta
    return ~((advantages < 0) & far.index_select(0, sequence_ids))


def _within(log_values: Tensor, *, low: float, high: float) -> Tensor:
    """Compare logarithms, as a product over a long sequence has no other finite form."""
    log_low = math.log(low) if low > 0 else -math.inf
    return (log_values >= log_low) & (log_values <= math.log(high))


def _at_most(
    values: Tensor, sequence_ids: Tensor, num_sequences: int, *, limit: float, level: RejectionLevel
) -> Tensor:
    match level:
        case "token":
            return values <= limit
        case "sequence_mean":
            statistics = sequence_means(values, sequence_ids, num_sequences)
        case "sequence_sum":
            statistics = sequence_sums(values, sequence_ids, num_sequences)
        case "sequence_max":
            statistics = values.new_zeros(num_sequences)
            statistics = statistics.scatter_reduce(0, sequence_ids, values, reduce="amax")
    return (statistics <= limit).index_select(0, sequence_ids)
