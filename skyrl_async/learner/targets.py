"""What the loss of a minibatch is compared with, fixed before its first optimizer step.

Shapes: ``T`` loss tokens of the minibatch, those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from skyrl_async.algorithms import kl
from skyrl_async.algorithms.aggregation import aggregation_weights
from skyrl_async.algorithms.behavior_losses import m2_mask
from skyrl_async.algorithms.composition import Correction, correct
from skyrl_async.algorithms.off_policy_returns import retrace, vtrace
from skyrl_async.algorithms.returns import (
    Returns,
    gae,
    length_adaptive_lambdas,
    reinforce_plus_plus_returns,
    turn_level_gae,
    turn_starts,
)
from skyrl_async.algorithms.reward_shaping import kl_in_reward
from skyrl_async.algorithms.step_size import ess_rate_scale
from skyrl_async.algorithms.tokens import sequence_sums
from skyrl_async.learner.algorithm_settings import MAX_LOG_RATIO, AlgorithmSettings
from skyrl_async.learner.critic import ValueTargets
from skyrl_async.learner.loss_batch import LossBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Fixed quantities of a minibatch's tokens; all ``[T]``.

    Attributes:
        advantages: final ones.
        aggregation: share of each token in the loss; 0 for one outside.
        proximal_logprobs: None if each microbatch takes those of its own first forward pass.
        correction: None likewise.
        reference_logprobs: None without a reference policy.
        values: None without a critic.
        teacher_divergence: mean of log policy minus log teacher, a number; None without a teacher.
        rate_scale: what to multiply the learning rate by.
        loss_kept: bool, of a loss with a mask of the whole minibatch; None for other losses.
    """

    advantages: Tensor
    aggregation: Tensor
    proximal_logprobs: Tensor | None = None
    correction: Correction | None = None
    reference_logprobs: Tensor | None = None
    values: ValueTargets | None = None
    teacher_divergence: float | None = None
    rate_scale: float = 1.0
    loss_kept: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What forward passes say about the tokens; None where none was needed."""

    proximal_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    bootstrap_values: Tensor | None


@torch.no_grad()
def make_targets(
    batch: LossBatch,
    settings: AlgorithmSettings,
    *,
    proximal_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    values: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Targets:
    """Compute advantages, then weights and masks, then denominators over what is kept.

    A token without a valid behavior logprob is never kept, whatever the settings. Advantages are
    of all tokens, kept or not.

    Args:
        batch: tokens of the minibatch.
        settings: how.
        proximal_logprobs: needed if ``settings.needs_whole_batch``.
        reference_logprobs: needed for a KL penalty.
        values: needed if ``settings.needs_values``.
        bootstrap_values: ``[S]``, of the state after each sequence, 0 where it ended; None if
            that is everywhere.

    Raises:
        ValueError: if something needed is missing.
    """
    known = _Known(
        proximal_logprobs=proximal_logprobs,
        reference_logprobs=reference_logprobs,
        values=values,
        bootstrap_values=bootstrap_values,
    )
    advantages, returns = _advantages(batch, settings, known)
    candidates = batch.behavior_logprobs.isfinite()
    if settings.mask_truncated:
        candidates = candidates & ~batch.truncated[batch.sequence_ids]
    advantages, correction = _corrected(batch, settings, known, advantages, candidates)
    kept = candidates if correction is None else correction.mask
    targets = Targets(
        advantages=advantages,
        aggregation=_shares(batch, settings, kept, dtype=advantages.dtype),
        proximal_logprobs=proximal_logprobs,
        correction=correction,
        reference_logprobs=reference_logprobs,
        rate_scale=_rate_scale(batch, settings, correction),
        loss_kept=_loss_kept(batch, settings, known, advantages, kept),
    )
    if returns is None or values is None:
        return targets
    if settings.advantage == "turn_level_gae":
        # The states before the other tokens lie within a turn and have no target.
        kept = kept & turn_starts(batch.sequence_ids, batch.turn_ids)
    shares = _shares(batch, settings, kept, dtype=advantages.dtype)
    drawn_to = ValueTargets(old_values=values, targets=returns.targets, aggregation=shares)
    return replace(targets, values=drawn_to)


def _corrected(
    batch: LossBatch,
    settings: AlgorithmSettings,
    known: _Known,
    advantages: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, Correction | None]:
    """Return the advantages, whitened if they are to be, and the correction of the minibatch.

    Masks that depend on signs see those that are trained: the advantages are whitened over what
    the other masks keep.
    """
    if not settings.needs_whole_batch:
        return whitened(advantages, candidates) if settings.whitens else advantages, None
    log_ratios = _needed(known.proximal_logprobs, "proximal logprobs") - batch.behavior_logprobs
    make = partial(
        correct,
        log_ratios.masked_fill(~candidates, torch.nan),
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
    )
    by = settings.correction
    if not settings.whitens:
        return advantages, make(advantages=advantages, settings=by)
    unsigned = replace(by, opsm_delta=None, m2_limit=None)
    correction = make(advantages=advantages, settings=unsigned)
    advantages = whitened(advantages, correction.mask)
    if by.reads_advantages:
        correction = make(advantages=advantages, settings=by)
    return advantages, correction


def _shares(
    batch: LossBatch, settings: AlgorithmSettings, kept: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Return ``[T]``: the part of each token in the loss, 0 for those not kept."""
    return aggregation_weights(
        batch.sequence_ids,
        batch.prompt_ids,
        kind=settings.aggregation,
        constant_length=settings.aggregation_length,
        mask=kept,
        dtype=dtype,
    )


def _loss_kept(
    batch: LossBatch, settings: AlgorithmSettings, known: _Known, advantages: Tensor, kept: Tensor
) -> Tensor | None:
    """Return ``[T]`` bool: the mask of ``m2po`` over the tokens that the correction keeps."""
    if not settings.loss_masks_minibatch:
        return None
    proximal = _needed(known.proximal_logprobs, "proximal logprobs")
    log_ratios = (proximal - batch.behavior_logprobs)[kept]
    placed = torch.ones_like(kept)
    placed[kept] = m2_mask(log_ratios, advantages[kept], **settings.loss_options)
    return placed


def _rate_scale(
    batch: LossBatch, settings: AlgorithmSettings, correction: Correction | None
) -> float:
    """Return what the effective sample fraction makes of the learning rate, if it is asked to."""
    if not settings.scale_rate_by_ess or correction is None:
        return 1.0
    weights, ids = correction.weights[correction.mask], batch.sequence_ids[correction.mask]
    if settings.correction.weight in ("sequence", "geometric"):
        # All tokens of a sequence have its weight, and it is one sample.
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        weights = weights[first]
    return float(ess_rate_scale(weights))


def whitened(advantages: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``[T]``: advantages with mean 0 and standard deviation 1 over the kept tokens."""
    chosen = advantages if kept is None else advantages[kept]
    if not chosen.numel():
        return advantages
    if chosen.min() == chosen.max():
        # The mean of equal numbers is not always that number.
        return torch.zeros_like(advantages)
    exact = chosen.double()
    centered = advantages.double() - exact.mean()
    return (centered / (exact.var(correction=0).sqrt() + 1e-6)).to(advantages.dtype)


def _advantages(
    batch: LossBatch, settings: AlgorithmSettings, known: _Known
) -> tuple[Tensor, Returns | None]:
    """Return advantages ``[T]``, and what the critic learns from if there is one."""
    penalty = _reward_penalty(batch, settings, known) if settings.kl_in_reward else None
    if not settings.needs_values:
        if penalty is None:
            return batch.advantages, None
        to_go = reinforce_plus_plus_returns(
            torch.zeros_like(penalty),
            penalty,
            batch.sequence_ids,
            beta=settings.kl.coefficient,
            gamma=settings.gamma,
        )
        if settings.whitens_returns:
            return batch.rewards[batch.sequence_ids] + to_go, None
        return batch.advantages + _centered_by_prompt(to_go, batch), None
    rewards = batch.token_rewards()
    if penalty is not None:
        rewards = kl_in_reward(rewards, penalty, coefficient=settings.kl.coefficient)
    returns = _returns(batch, settings, rewards, known)
    return returns.advantages, returns


def _reward_penalty(batch: LossBatch, settings: AlgorithmSettings, known: _Known) -> Tensor:
    """Return ``[T]``: the divergence from the reference policy that each token pays for."""
    proximal = _needed(known.proximal_logprobs, "proximal logprobs")
    to_behavior = proximal - batch.behavior_logprobs
    return kl.divergence(
        settings.kl.kind,
        proximal - _needed(known.reference_logprobs, "reference logprobs"),
        # A token that leaves the loss pays as one of the behavior policy's.
        log_ratios_to_behavior=to_behavior.masked_fill(to_behavior.isnan(), 0.0),
        clamp=MAX_LOG_RATIO,
    )


def _centered_by_prompt(to_go: Tensor, batch: LossBatch) -> Tensor:
    """Return ``to_go [T]`` minus its mean over the tokens of the prompt."""
    num_prompts = int(batch.prompt_ids.max()) + 1 if batch.prompt_ids.numel() else 0
    counts = sequence_sums(torch.ones_like(to_go), batch.prompt_ids, num_prompts).clamp(min=1)
    means = sequence_sums(to_go, batch.prompt_ids, num_prompts) / counts
    return to_go - means[batch.prompt_ids]


def _returns(
    batch: LossBatch, settings: AlgorithmSettings, rewards: Tensor, known: _Known
) -> Returns:
    ids, gamma, lam = batch.sequence_ids, settings.gamma, settings.gae_lambda
    values, after = _needed(known.values, "values"), known.bootstrap_values
    if settings.advantage == "gae":
        return gae(rewards, values, ids, gamma=gamma, lam=lam, bootstrap_values=after)
    if settings.advantage == "turn_level_gae":
        return turn_level_gae(
            rewards, values, ids, batch.turn_ids, gamma=gamma, lam=lam, bootstrap_values=after
        )
    if settings.advantage == "length_adaptive_gae":
        alpha = settings.length_adaptive_alpha
        lambdas = length_adaptive_lambdas(ids, batch.num_sequences, alpha=alpha).to(values.dtype)
        policy = gae(rewards, values, ids, gamma=gamma, lam=lambdas, bootstrap_values=after)
        critic = gae(rewards, values, ids, gamma=gamma, lam=1.0, bootstrap_values=after)
        return Returns(advantages=policy.advantages, targets=critic.targets)
    log_importance = _log_importance(batch, known)
    if settings.advantage == "retrace":
        return retrace(
            rewards, values, ids, log_importance, gamma=gamma, lam=lam, bootstrap_values=after
        )
    return vtrace(
        rewards,
        values,
        ids,
        log_importance,
        gamma=gamma,
        lam=lam,
        rho_cap=settings.rho_cap,
        c_cap=settings.c_cap,
        # Where the correction or the loss has the importance weight, it would count twice.
        weighted_advantages=settings.correction.weight == "none" and not settings.loss_is_weighted,
        # So that on-policy advantages are those of GAE with the same lambda.
        lam_in_advantages=True,
        bootstrap_values=after,
    )


def _log_importance(batch: LossBatch, known: _Known) -> Tensor:
    """Return ``[T]``: log of proximal over behavior; a trace ends at a token that has none."""
    ratios = _needed(known.proximal_logprobs, "proximal logprobs") - batch.behavior_logprobs
    return ratios.masked_fill(batch.behavior_logprobs.isnan(), -torch.inf)


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"these settings need {name}, and were given none")
    return tensor
