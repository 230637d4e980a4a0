"""What policy losses and corrections work on: the loss tokens of whole sequences, end to end.

Shapes: ``T`` loss tokens, ``S`` sequences. A sequence is one trajectory, or one branch of it; only
its loss tokens are here, so that every length and every denominator counts these alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


def sequence_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return ``[S]``: the sum of ``values [T]`` over each sequence; 0 for one without tokens."""
    sums = values.new_zeros(num_sequences)
    return sums.index_add(0, sequence_ids, values)


def sequence_means(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Return ``[S]``: the mean of ``values [T]`` over each sequence; 0 for one without tokens."""
    lengths = torch.bincount(sequence_ids, minlength=num_sequences).clamp(min=1).to(values.dtype)
    return sequence_sums(values, sequence_ids, num_sequences) / lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """Loss tokens with their three logprobs; all tensors ``[T]``.

    Attributes:
        current_logprobs: of the weights being differentiated; the only ones with gradient.
        proximal_logprobs: of the weights at the start of the step.
        behavior_logprobs: of the weights that sampled the tokens, as the engine reported them.
        advantages: of the tokens.
        sequence_ids: int64, the sequence of each token, in ``0 .. num_sequences - 1``; the tokens
            of a sequence are in order, and next to each other.
        num_sequences: S.
    """

    current_logprobs: Tensor
    proximal_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        shapes = {
            tuple(tensor.shape)
            for tensor in (
                self.current_logprobs,
                self.proximal_logprobs,
                self.behavior_logprobs,
                self.advantages,
                self.sequence_ids,
            )
        }
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"loss tokens need tensors of one shape [T], got {sorted(shapes)}")

    def select(self, mask: Tensor) -> Self:
        """Return the tokens where ``mask [T]`` is true; the others have no part in anything."""
        return replace(
            self,
            current_logprobs=self.current_logprobs[mask],
            proximal_logprobs=self.proximal_logprobs[mask],
            behavior_logprobs=self.behavior_logprobs[mask],
            advantages=self.advantages[mask],
            sequence_ids=self.sequence_ids[mask],
        )

    def sums(self, values: Tensor) -> Tensor:
        """Return ``[S]``: sums of ``values [T]`` over sequences."""
        return sequence_sums(values, self.sequence_ids, self.num_sequences)

    def means(self, values: Tensor) -> Tensor:
        """Return ``[S]``: means of ``values [T]`` over sequences."""
        return sequence_means(values, self.sequence_ids, self.num_sequences)

    def spread(self, values: Tensor) -> Tensor:
        """Return ``[T]``: the value ``values [S]`` of each token's sequence."""
        return values.index_select(0, self.sequence_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """What a policy loss returns for every token.

    Attributes:
        loss: ``[T]``, to be minimized, before importance weights and aggregation.
        clipped: ``[T]`` bool, tokens that a trust region leaves without gradient; no gradient.
    """

    loss: Tensor
    clipped: Tensor
