"""The loss tokens of one minibatch as flat arrays, the same on every rank.

A minibatch is split into microbatches over ranks, but what a token's loss is compared with may
depend on tokens elsewhere: the rest of its sequence, or of the minibatch. So every rank has these
arrays for the whole minibatch, and a microbatch says which of the tokens are its own.

Shapes: ``T`` loss tokens of the minibatch in the order of its sequences, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl_async.algorithms.corrections import finite_mask
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.types import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBatch:
    """What is known of the tokens before any forward pass.

    Attributes:
        behavior_logprobs: ``[T]``, of the engine; NaN where it reported none that can be one.
        policy_versions: ``[T]`` int64, that sampled the tokens.
        advantages: ``[T]``, from rewards alone.
        sequence_ids: ``[T]`` int64, in ``0 .. S - 1``.
        prompt_ids: ``[T]`` int64, the group of each token, in ``0 .. number of groups - 1``.
        turn_ids: ``[T]`` int64, the reply of each token within its sequence, counted from 0.
        rewards: ``[S]``, of the trajectories.
        truncated: ``[S]`` bool, whether a limit ended them.
    """

    behavior_logprobs: Tensor
    policy_versions: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    prompt_ids: Tensor
    turn_ids: Tensor
    rewards: Tensor
    truncated: Tensor

    @classmethod
    def of(
        cls,
        sequences: Sequence[TrainSequence],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> LossBatch:
        """Lay the loss tokens of ``sequences`` end to end."""
        masks = [s.loss_mask for s in sequences]
        lengths = [int(mask.sum()) for mask in masks]
        groups = {group_id: i for i, group_id in enumerate({s.group_id: 0 for s in sequences})}

        def tokens(name: str) -> np.ndarray:
            parts = [getattr(s, name)[m] for s, m in zip(sequences, masks, strict=True)]
            return np.concatenate(parts) if parts else np.zeros(0)

        def spread(values: Sequence[int]) -> Tensor:
            return torch.from_numpy(np.repeat(np.asarray(values, np.int64), lengths))

        turns = [_turn_ids(mask) for mask in masks]
        fields = {
            "behavior_logprobs": torch.from_numpy(tokens("behavior_logprobs")).to(dtype),
            "policy_versions": torch.from_numpy(tokens("policy_versions")).to(torch.int64),
            "advantages": torch.from_numpy(tokens("advantages")).to(dtype),
            "sequence_ids": spread(range(len(sequences))),
            "prompt_ids": spread([groups[s.group_id] for s in sequences]),
            "turn_ids": torch.from_numpy(np.concatenate(turns) if turns else np.zeros(0, np.int64)),
            "rewards": torch.tensor([s.reward for s in sequences], dtype=dtype),
            "truncated": torch.tensor([s.truncated for s in sequences], dtype=torch.bool),
        }
        reported = fields["behavior_logprobs"]
        fields["behavior_logprobs"] = reported.masked_fill(~finite_mask(reported), torch.nan)
        return cls(**{name: tensor.to(device) for name, tensor in fields.items()})

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.rewards)

    def token_rewards(self) -> Tensor:
        """Return ``[T]``: the trajectory's reward at its last loss token, 0 elsewhere."""
        rewards = torch.zeros_like(self.behavior_logprobs)
        last = torch.ones_like(self.sequence_ids, dtype=torch.bool)
        last[:-1] = self.sequence_ids[1:] != self.sequence_ids[:-1]
        rewards[last] = self.rewards[self.sequence_ids[last]]
        return rewards


def _turn_ids(mask: np.ndarray) -> np.ndarray:
    """Return which run of loss tokens each of them is in."""
    where = np.flatnonzero(mask)
    return np.cumsum(np.diff(where, prepend=where[:1]) > 1)


@torch.no_grad()
def gathered(
    compute: Callable[[Microbatch], Tensor],
    microbatches: Sequence[Microbatch],
    *,
    like: Tensor,
    ranks: RankGroup,
) -> Tensor:
    """Return ``[T]`` on every rank: ``compute`` of each microbatch, at its tokens' places.

    Args:
        compute: one value per loss token of a microbatch.
        microbatches: of this rank.
        like: ``[T]``, of the result's type.
        ranks: of the learner group; each token is computed by one of them, or by a sequence group.
    """
    values = torch.zeros_like(like)
    for microbatch in microbatches:
        computed = compute(microbatch)
        if ranks.counts:
            values[microbatch.index] = computed.to(values.dtype)
    return ranks.sum_(values)
