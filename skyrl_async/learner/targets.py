"""What the loss of a minibatch is compared with, fixed before its first optimizer step.

Shapes: ``T`` loss tokens of the minibatch, those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skyrl_async.algorithms.aggregation import aggregation_weights
from skyrl_async.algorithms.composition import Correction, correct
from skyrl_async.algorithms.off_policy_returns import retrace, vtrace
from skyrl_async.algorithms.returns import (
    Returns,
    gae,
    length_adaptive_lambdas,
    reinforce_plus_plus_returns,
    turn_level_gae,
)
from skyrl_async.algorithms.reward_shaping import kl_in_reward
from skyrl_async.algorithms.tokens import sequence_sums
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
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
    """

    advantages: Tensor
    aggregation: Tensor
    proximal_logprobs: Tensor | None = None
    correction: Correction | None = None
    reference_logprobs: Tensor | None = None
    values: ValueTargets | None = None
    teacher_divergence: float | None = None


@torch.no_grad()
def make_targets(
    batch: LossBatch,
    settings: AlgorithmSettings,
    *,
    proximal_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    values: Tensor | None = None,
) -> Targets:
    """Compute advantages, then weights and masks, then denominators over what is kept.

    Args:
        batch: tokens of the minibatch.
        settings: how.
        proximal_logprobs: needed if ``settings.needs_whole_batch``.
        reference_logprobs: needed for a KL penalty.
        values: needed if ``settings.needs_values``.

    Raises:
        ValueError: if something needed is missing.
    """
    advantages, returns = _advantages(
        batch, settings, proximal_logprobs, reference_logprobs, values
    )
    correction = None
    if settings.needs_whole_batch:
        correction = correct(
            _needed(proximal_logprobs, "proximal logprobs") - batch.behavior_logprobs,
            advantages=advantages,
            sequence_ids=batch.sequence_ids,
            num_sequences=batch.num_sequences,
            settings=settings.correction,
        )
    kept = None if correction is None else correction.mask
    if settings.whiten_advantages:
        advantages = whitened(advantages, kept)
    aggregation = aggregation_weights(
        batch.sequence_ids,
        batch.prompt_ids,
        kind=settings.aggregation,
        constant_length=settings.aggregation_length,
        mask=kept,
        dtype=advantages.dtype,
    )
    targets = Targets(
        advantages=advantages,
        aggregation=aggregation,
        proximal_logprobs=proximal_logprobs,
        correction=correction,
        reference_logprobs=reference_logprobs,
    )
    if returns is None or values is None:
        return targets
    drawn_to = ValueTargets(old_values=values, targets=returns.targets, aggregation=aggregation)
    return replace(targets, values=drawn_to)


def whitened(advantages: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``[T]``: advantages with mean 0 and standard deviation 1 over the kept tokens."""
    chosen = advantages if kept is None else advantages[kept]
    if not chosen.numel():
        return advantages
    spread = chosen.var(correction=0).sqrt()
    return (advantages - chosen.mean()) / (spread + 1e-6)


def _advantages(
    batch: LossBatch,
    settings: AlgorithmSettings,
    proximal_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Returns | None]:
    """Return advantages ``[T]``, and what the critic learns from if there is one."""
    kl = None
    if settings.kl_in_reward:
        proximal = _needed(proximal_logprobs, "proximal logprobs")
        kl = proximal - _needed(reference_logprobs, "reference logprobs")
    if not settings.needs_values:
        if kl is None:
            return batch.advantages, None
        to_go = reinforce_plus_plus_returns(
            torch.zeros_like(kl),
            kl,
            batch.sequence_ids,
            beta=settings.kl.coefficient,
            gamma=settings.gamma,
        )
        return batch.advantages + _centered_by_prompt(to_go, batch), None
    rewards = batch.token_rewards()
    if kl is not None:
        rewards = kl_in_reward(rewards, kl, coefficient=settings.kl.coefficient)
    returns = _returns(batch, settings, rewards, _needed(values, "values"), proximal_logprobs)
    return returns.advantages, returns


def _centered_by_prompt(to_go: Tensor, batch: LossBatch) -> Tensor:
    """Return ``to_go [T]`` minus its mean over the tokens of the prompt."""
    num_prompts = int(batch.prompt_ids.max()) + 1 if batch.prompt_ids.numel() else 0
    counts = sequence_sums(torch.ones_like(to_go), batch.prompt_ids, num_prompts).clamp(min=1)
    means = sequence_sums(to_go, batch.prompt_ids, num_prompts) / counts
    return to_go - means[batch.prompt_ids]


def _returns(
    batch: LossBatch,
    settings: AlgorithmSettings,
    rewards: Tensor,
    values: Tensor,
    proximal_logprobs: Tensor | None,
) -> Returns:
    ids, gamma, lam = batch.sequence_ids, settings.gamma, settings.gae_lambda
    if settings.advantage == "gae":
        return gae(rewards, values, ids, gamma=gamma, lam=lam)
    if settings.advantage == "turn_level_gae":
        return turn_level_gae(rewards, values, ids, batch.turn_ids, gamma=gamma, lam=lam)
    if settings.advantage == "length_adaptive_gae":
        alpha = settings.length_adaptive_alpha
        lambdas = length_adaptive_lambdas(ids, batch.num_sequences, alpha=alpha).to(values.dtype)
        policy = gae(rewards, values, ids, gamma=gamma, lam=lambdas)
        critic = gae(rewards, values, ids, gamma=gamma, lam=1.0)
        return Returns(advantages=policy.advantages, targets=critic.targets)
    log_importance = _needed(proximal_logprobs, "proximal logprobs") - batch.behavior_logprobs
    if settings.advantage == "retrace":
        return retrace(rewards, values, ids, log_importance, gamma=gamma, lam=lam)
    # The importance weight is the correction's; in the advantage it would count twice.
    weighted = settings.correction.weight == "none"
    return vtrace(
        rewards,
        values,
        ids,
        log_importance,
        gamma=gamma,
        lam=lam,
        rho_cap=settings.rho_cap,
        c_cap=settings.c_cap,
        weighted_advantages=weighted,
        # So that on-policy advantages are those of GAE with the same lambda.
        lam_in_advantages=True,
    )


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"these settings need {name}, and were given none")
    return tensor
