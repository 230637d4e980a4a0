"""Loss aggregation: weights of tokens with which their losses sum to the loss of the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AggregationKind = Literal["token_mean", "sequence_mean", "prompt_mean", "constant"]


def aggregation_weights(
    sequence_ids: Tensor,
    prompt_ids: Tensor,
    *,
    kind: AggregationKind,
    constant_length: int | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Return weights ``[T]`` with which the token losses sum to the aggregated loss.

    With the kept tokens :math:`K_i` of sequence i and :math:`K_p` of prompt p, and the number of
    sequences S and prompts P that have any:

    .. math::

        \text{token_mean: } & 1 \Big/ \textstyle\sum_i |K_i| \\
        \text{sequence_mean: } & 1 / (S \, |K_i|) \\
        \text{prompt_mean: } & 1 / (P \, |K_p|) \\
        \text{constant: } & 1 / (S \, L)

    Take the weights once over the minibatch of all ranks and slice them: losses and gradients of
    the parts then add up to those of the minibatch, however it is split.

    Args:
        sequence_ids: ``[T]``, of any integers.
        prompt_ids: ``[T]``, the prompt of each token, of any integers.
        kind: whether tokens, sequences or prompts count equally, or every sum over a sequence is
            divided by a constant.
        constant_length: L, which ``constant`` needs; for example the most tokens of a reply.
        mask: ``[T]`` bool, the tokens that count; None for all. Others have weight 0.
        dtype: of the weights.

    Raises:
        ValueError: if the shapes differ, or ``constant`` lacks a positive ``constant_length``.

    Source: token_mean: DAPO (arXiv 2503.14476), whose equation 8 is prompt_mean and whose code
    counts the batch; sequence_mean: GRPO (arXiv 2402.03300), equation 3; prompt_mean: ScaleRL
    (arXiv 2510.13786), appendix A.2; constant: Dr. GRPO (arXiv 2503.20783).
    """
    kept = torch.ones_like(sequence_ids, dtype=torch.bool) if mask is None else mask
    shapes = {tuple(tensor.shape) for tensor in (sequence_ids, prompt_ids, kept)}
    if len(shapes) > 1:
        raise ValueError(f"sequence_ids, prompt_ids and mask differ in shape: {sorted(shapes)}")
    weights = torch.zeros(sequence_ids.shape, dtype=dtype, device=sequence_ids.device)
    if kind == "constant":
        if constant_length is None or constant_length <= 0:
            raise ValueError(
                f"constant_length={constant_length}: kind=constant needs a positive number; set "
                "for example the most tokens of a reply"
            )
        num_sequences = sequence_ids[kept].unique().numel()
        weights[kept] = 1 / (max(num_sequences, 1) * constant_length)
        return weights
    match kind:
        case "token_mean":
            groups = torch.zeros_like(sequence_ids)
        case "sequence_mean":
            groups = sequence_ids
        case "prompt_mean":
            groups = prompt_ids
    _, group, lengths = groups[kept].unique(return_inverse=True, return_counts=True)
    weights[kept] = 1 / (lengths.numel() * lengths.to(dtype))[group]
    return weights
