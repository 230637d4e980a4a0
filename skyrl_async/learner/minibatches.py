"""From a batch's sequences to minibatches: what each rank computes, and what all of them know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.packing import (
    PAIR_COST,
    Layout,
    Microbatch,
    first_loss_indices,
    pack,
    split_by_cost,
)
from skyrl_async.learner.policy_trainer import PolicyTrainer
from skyrl_async.learner.targets import Targets
from skyrl_async.types import TrainSequence


@dataclass(slots=True)
class Minibatch:
    """This rank's share of one minibatch, and what all ranks know of the whole.

    Attributes:
        microbatches: of this rank.
        tokens: of all ranks.
        sequences: of all ranks, in the order of ``tokens``.
        targets: once they are made.
        proximal_logprobs: for each microbatch, once it had its first forward pass.
    """

    microbatches: list[Microbatch]
    tokens: LossBatch
    sequences: Sequence[TrainSequence]
    targets: Targets | None = None
    proximal_logprobs: list[Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingSettings:
    """How sequences are laid out.

    Attributes:
        tokens_per_microbatch: of one forward and backward pass.
        layout: of rows; ranks that share tokens need ``flat``.
        pair_cost: of the model's attention, see :func:`~.packing.pair_cost_of`.
    """

    tokens_per_microbatch: int = 8192
    layout: Layout = "auto"
    pair_cost: float = PAIR_COST


def make_minibatches(
    sequences: Sequence[TrainSequence],
    *,
    num_minibatches: int,
    seed: Sequence[int],
    packing: PackingSettings,
    trainer: PolicyTrainer,
) -> list[Minibatch]:
    """Shuffle sequences into minibatches and take this rank's share of each.

    Args:
        sequences: of the whole batch, the same on every rank.
        num_minibatches: at most; there are fewer if there are fewer sequences.
        seed: of the shuffling, the same on every rank.
        packing: of each rank's share.
        trainer: whose ranks share the work.
    """
    order = np.random.default_rng(list(seed)).permutation(len(sequences))
    chunks = [chunk for chunk in np.array_split(order, num_minibatches) if len(chunk)]
    return [_minibatch([sequences[i] for i in chunk], packing, trainer) for chunk in chunks]


def _minibatch(
    sequences: Sequence[TrainSequence], packing: PackingSettings, trainer: PolicyTrainer
) -> Minibatch:
    ranks, dtype = trainer.ranks, trainer.dtype
    lengths = [len(s.token_ids) for s in sequences]
    shares = split_by_cost(lengths, num_parts=ranks.num_data_ranks, pair_cost=packing.pair_cost)
    share = shares[ranks.data_rank]
    first_indices = first_loss_indices(sequences)
    microbatches = pack(
        [sequences[i] for i in share],
        tokens_per_microbatch=packing.tokens_per_microbatch,
        dtype=dtype,
        first_indices=[first_indices[i] for i in share],
        layout=packing.layout,
        pair_cost=packing.pair_cost,
    )
    return Minibatch(
        microbatches=list(trainer.matched(microbatches)),
        tokens=LossBatch.of(sequences, dtype=dtype, device=ranks.device),
        sequences=sequences,
    )
