"""The baseline of least variance under importance weights, which needs every trajectory's gradient.

It costs one backward pass for each trajectory of a batch, as a sum of gradients has no norms of its
parts; ``benchmarks/algorithms.py`` says how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl_async.algorithms.advantages import optimal_off_policy_baseline
from skyrl_async.algorithms.corrections import finite_mask
from skyrl_async.learner.logprobs import token_logprobs
from skyrl_async.learner.packing import pack, split_by_cost
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.types import TrainSequence


def with_off_policy_baseline(
    sequences: Sequence[TrainSequence],
    model: Any,
    *,
    ranks: RankGroup,
    weight_cap: float,
) -> list[TrainSequence]:
    """Return the sequences with advantages from the optimal off-policy baseline of their group.

    The weight of a trajectory is the product of its tokens' ratios of the present to the behavior
    policy, truncated; tokens without a valid behavior logprob have no part in anything. If a ratio
    or a gradient is not finite, all advantages are NaN, so that the step is skipped.

    Args:
        sequences: of a whole batch, the same on every rank.
        model: the policy at the start of the step.
        ranks: of the learner group; each trajectory is differentiated by one of them.
        weight_cap: largest weight.

    Source: VCPO (arXiv 2602.17616).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    log_weights, squared_norms = torch.zeros(2, len(sequences), dtype=torch.float64)
    lengths = [len(s.token_ids) for s in sequences]
    for index in split_by_cost(lengths, num_parts=ranks.num_ranks)[ranks.rank]:
        (packed,) = pack([sequences[index]], tokens_per_microbatch=1, dtype=parameters[0].dtype)
        microbatch = packed.to(ranks.device)
        valid = finite_mask(microbatch.behavior_logprobs)
        with torch.enable_grad():
            logprobs = token_logprobs(model, microbatch)[valid]
            gradients = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
        log_weights[index] = (
            (logprobs.detach() - microbatch.behavior_logprobs[valid]).double().sum()
        )
        squared_norms[index] = _squared_norm(gradients)
    weights = ranks.sum_(log_weights).exp().clamp(max=weight_cap).numpy()
    norms = ranks.sum_(squared_norms).numpy()
    advantages = np.full(len(sequences), np.nan)
    if np.isfinite(weights).all() and np.isfinite(norms).all():
        group_ids = np.array([s.group_id for s in sequences])
        rewards = np.array([s.reward for s in sequences])
        for group_id in np.unique(group_ids):
            own = group_ids == group_id
            advantages[own] = optimal_off_policy_baseline(rewards[own], weights[own], norms[own])
    return [
        replace(s, advantages=s.loss_mask * np.float32(value))
        for s, value in zip(sequences, advantages, strict=True)
    ]


def _squared_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum()
