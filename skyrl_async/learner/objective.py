r"""The training objective of one microbatch: every choice of algorithm meets here.

.. math::

    L = \sum_t a_t \big( w_t \, \ell_t + c_R R_t - c_H H_t + c_{KL} \, \mathrm{KL}_t \big)

``a`` are the shares of aggregation, ``w`` the importance weights, ``l`` the policy loss, ``R`` the
squared log ratio to the behavior policy. Tokens that a correction rejects have no part in any of
it: what pulls the policy back to the reference does not reach them either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_async.algorithms import kl
from skyrl_async.algorithms.composition import CorrectionSettings, correct
from skyrl_async.algorithms.regularizers import squared_log_ratio
from skyrl_async.algorithms.tokens import LossTokens
from skyrl_async.learner.algorithm_settings import MAX_LOG_RATIO, AlgorithmSettings, KlSettings
from skyrl_async.learner.logprobs import TokenOutputs
from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.targets import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The value of one microbatch and what is worth knowing about its tokens.

    Attributes:
        total: scalar, this microbatch's part of the minibatch's objective.
        sums: quantities summed over the kept tokens (``tokens`` counts them); ``kl_behavior`` over
            all with a valid ratio (``valid_tokens``); no gradient.
        largest_weight: of the importance weights before truncation, masked ones included; no
            gradient.
    """

    total: Tensor
    sums: dict[str, Tensor]
    largest_weight: Tensor


def objective(
    outputs: TokenOutputs,
    microbatch: Microbatch,
    batch: LossBatch,
    targets: Targets,
    *,
    proximal_logprobs: Tensor,
    settings: AlgorithmSettings,
) -> Objective:
    """Return the objective of one microbatch.

    Args:
        outputs: of the forward pass; carry the gradient.
        microbatch: whose tokens they are.
        batch: the minibatch that the microbatch is of.
        targets: of that minibatch.
        proximal_logprobs: ``[L]``, of the microbatch's tokens.
        settings: what to minimize.
    """
    index = microbatch.index
    tokens, log_ratios = _loss_tokens(outputs, microbatch, batch, targets, proximal_logprobs)
    weights, raw, valid = _correction(tokens, log_ratios, index, targets, settings.correction)
    share = targets.aggregation[index]
    kept = valid & (share > 0)
    tokens, share = tokens.select(kept), share[kept]
    entropy = outputs.entropy[kept]
    options = dict(settings.loss_options)
    if targets.loss_kept is not None:
        options["kept"] = targets.loss_kept[index][kept]
    policy = settings.loss(tokens, **options)
    policy_loss = (share * weights[kept] * policy.loss).sum()
    total = policy_loss - settings.entropy_coefficient * (share * entropy).sum()
    if settings.squared_log_ratio_coefficient:
        squared = squared_log_ratio(tokens)
        total = total + settings.squared_log_ratio_coefficient * (share * squared).sum()
    divergence = torch.zeros_like(share)
    if targets.reference_logprobs is not None:
        reference = targets.reference_logprobs[index][kept]
        divergence = _divergence(tokens, reference, settings.kl)
        if settings.kl.placement == "loss":
            total = total + settings.kl.coefficient * (share * divergence).sum()
    # A rejected token must not hide that the policy itself is broken: 0 times NaN is NaN.
    total = total + 0.0 * outputs.logprobs.detach().sum()
    return Objective(
        total=total,
        sums={
            **_ratio_sums(log_ratios, weights, raw, kept, settings.correction),
            "loss": policy_loss.detach(),
            "entropy": entropy.detach().sum(),
            "clipped": policy.clipped.sum(),
            "kl_reference": divergence.detach().sum(),
        },
        largest_weight=raw.max() if raw.numel() else raw.new_zeros(()),
    )


def _loss_tokens(
    outputs: TokenOutputs,
    microbatch: Microbatch,
    batch: LossBatch,
    targets: Targets,
    proximal_logprobs: Tensor,
) -> tuple[LossTokens, Tensor]:
    """Return the microbatch's tokens, and proximal minus behavior logprobs ``[L]``."""
    index, proximal = microbatch.index, proximal_logprobs.detach()
    behavior = batch.behavior_logprobs[index]
    _, ids = batch.sequence_ids[index].unique_consecutive(return_inverse=True)
    tokens = LossTokens(
        current_logprobs=outputs.logprobs,
        proximal_logprobs=proximal,
        behavior_logprobs=behavior,
        advantages=targets.advantages[index],
        sequence_ids=ids,
        num_sequences=int(ids[-1]) + 1 if len(ids) else 0,
    )
    return tokens, proximal - behavior


def _correction(
    tokens: LossTokens,
    log_ratios: Tensor,
    index: Tensor,
    targets: Targets,
    settings: CorrectionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, weight before truncation, and mask of the tokens; each ``[L]``."""
    made = targets.correction
    if made is None:
        made = correct(
            log_ratios,
            advantages=tokens.advantages,
            sequence_ids=tokens.sequence_ids,
            num_sequences=tokens.num_sequences,
            settings=settings,
        )
        index = torch.arange(len(log_ratios), device=log_ratios.device)
    raw = made.raw_weights[index]
    if settings.weight == "none":
        # Without a weight in the loss, that of the tokens still says how much is off-policy.
        raw = log_ratios.exp().masked_fill(~log_ratios.isfinite(), 0.0)
    return made.weights[index], raw, made.mask[index]


def _divergence(tokens: LossTokens, reference: Tensor, settings: KlSettings) -> Tensor:
    """Return ``[T]``: the divergence from the reference policy; as K3 where it is no loss."""
    return kl.divergence(
        settings.kind if settings.placement == "loss" else "k3",
        tokens.current_logprobs - reference,
        log_ratios_to_behavior=tokens.current_logprobs - tokens.behavior_logprobs,
        clamp=MAX_LOG_RATIO,
    )


def _ratio_sums(
    log_ratios: Tensor, weights: Tensor, raw: Tensor, kept: Tensor, settings: CorrectionSettings
) -> dict[str, Tensor]:
    """Return sums that say how far the data is from the policy."""
    finite = log_ratios[log_ratios.isfinite()]
    used = raw[kept] if settings.weight == "none" else weights[kept]
    return {
        "tokens": kept.sum(),
        "masked": (~kept).sum(),
        "importance_weight": used.sum(),
        "importance_weight_squared": used.square().sum(),
        "importance_weight_capped": (raw[kept] > settings.weight_cap).sum(),
        "valid_tokens": log_ratios.new_tensor(finite.numel()),
        "kl_behavior": kl.k3(-finite).sum(),
    }
