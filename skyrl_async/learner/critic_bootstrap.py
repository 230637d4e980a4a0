"""The critic's value of the state after the last token of a sequence, where a limit cut it off.

A value belongs to the state *before* a token, so that no loss token has this one: it takes a
forward pass of its own, over the chosen sequences alone.

Shapes: ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from skyrl_async.learner.critic import Critic
from skyrl_async.learner.loss_batch import gathered
from skyrl_async.learner.minibatches import PackingSettings
from skyrl_async.learner.packing import pack, split_by_cost
from skyrl_async.learner.policy_trainer import PolicyTrainer
from skyrl_async.types import TrainSequence


@torch.no_grad()
def values_after(
    critic: Critic,
    sequences: Sequence[TrainSequence],
    chosen: Sequence[bool],
    *,
    trainer: PolicyTrainer,
    packing: PackingSettings,
) -> Tensor:
    """Return ``[S]``: the value after the last token of each chosen sequence, 0 for the others.

    Args:
        critic: whose values they are.
        sequences: of a minibatch, the same on every rank.
        chosen: of each sequence.
        trainer: of the policy, whose ranks share the work.
        packing: of each rank's share.
    """
    ranks, dtype = trainer.ranks, trainer.dtype
    after = torch.zeros(len(sequences), dtype=dtype, device=ranks.device)
    places = np.flatnonzero(chosen).tolist()
    if not places:
        return after
    longer = [_with_token_after(sequences[place]) for place in places]
    lengths = [len(s.token_ids) for s in longer]
    shares = split_by_cost(lengths, num_parts=ranks.num_data_ranks, pair_cost=packing.pair_cost)
    share = shares[ranks.data_rank]
    microbatches = pack(
        [longer[i] for i in share],
        tokens_per_microbatch=packing.tokens_per_microbatch,
        dtype=dtype,
        first_indices=share,
        layout=packing.layout,
        pair_cost=packing.pair_cost,
    )
    matched = list(trainer.matched(microbatches))
    after[places] = gathered(critic.values, matched, like=after[places], ranks=ranks)
    return after


def _with_token_after(sequence: TrainSequence) -> TrainSequence:
    """Return the sequence and one more token, which alone is in the loss.

    The state before it is the state after the sequence. Which token it is does not matter, because
    the last token of a sequence is predicted and not read.
    """

    def longer(values: np.ndarray, after: float) -> np.ndarray:
        return np.append(values, values.dtype.type(after))

    return replace(
        sequence,
        token_ids=longer(sequence.token_ids, 0),
        loss_mask=longer(np.zeros_like(sequence.loss_mask), True),
        behavior_logprobs=longer(sequence.behavior_logprobs, 0),
        policy_versions=longer(sequence.policy_versions, sequence.policy_versions.max()),
        advantages=longer(sequence.advantages, 0),
    )
