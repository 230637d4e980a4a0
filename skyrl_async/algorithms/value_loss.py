"""Critic loss: a pure function on the values of the loss tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_async.algorithms.tokens import TokenLoss


def clipped_value_loss(
    values: Tensor, *, old_values: Tensor, targets: Tensor, clip: float | None
) -> TokenLoss:
    r"""Return the squared error of every token, pessimistic about steps beyond a clip range.

    .. math::

        v^{clip}_t &= \operatorname{clip}(v_t, v^{old}_t - \epsilon, v^{old}_t + \epsilon) \\
        L_t &= \tfrac12 \max\big((v_t - R_t)^2, (v^{clip}_t - R_t)^2\big)

    Args:
        values: ``[T]``, with gradient.
        old_values: ``[T]``, of the critic that the targets were computed with.
        targets: ``[T]``, R, the returns to predict.
        clip: epsilon, in units of values; None for the plain squared error.

    Raises:
        ValueError: if the shapes differ.

    Source: the published implementation of PPO (Schulman et al. 2017, arXiv 1707.06347), as
    described by Engstrom et al. 2020 (arXiv 2005.12729), section 3.
    """
    shapes = {tuple(tensor.shape) for tensor in (values, old_values, targets)}
    if len(shapes) > 1:
        raise ValueError(f"values, old_values and targets differ in shape: {sorted(shapes)}")
    old_values, targets = old_values.detach(), targets.detach()
    errors = (values - targets).square()
    if clip is None:
        return TokenLoss(loss=0.5 * errors, clipped=torch.zeros_like(values, dtype=torch.bool))
    clipped_values = values.clamp(old_values - clip, old_values + clip)
    clipped_errors = (clipped_values - targets).square()
    return TokenLoss(
        loss=0.5 * torch.maximum(errors, clipped_errors),
        clipped=(clipped_errors > errors).detach(),
    )
