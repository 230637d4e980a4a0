"""The critic: the value of the state before each loss token, and how it is trained.

Shapes: ``L`` loss tokens of a microbatch, ``T`` of a minibatch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skyrl_async.algorithms.value_loss import clipped_value_loss
from skyrl_async.learner.logprobs import PolicyModule, hidden_states, token_hidden
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.policy_trainer import PolicyTrainer
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sharding import FillParameters, ShardingSettings, prepare

CriticKind = Literal["head", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """How to train the critic.

    Attributes:
        kind: ``head``: a linear layer on the policy's last hidden state, which it does not train;
            ``model``: that, on a copy of the policy's decoder of its own, all of it trained.
        learning_rate: of its own AdamW.
        updates: optimizer steps for each of the policy's.
        clip: values move at most so far from those at the start of the step; None for no limit.
        max_grad_norm: gradients are scaled down to this norm.
        bootstrap_truncated: the value after the last token of a trajectory that a limit ended is
            the critic's, not 0.
    """

    kind: CriticKind = "model"
    learning_rate: float = 2e-3
    updates: int = 1
    clip: float | None = 0.2
    max_grad_norm: float = 1.0
    bootstrap_truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What the values of a minibatch are drawn to; all ``[T]``.

    Attributes:
        old_values: at the start of the step.
        targets: for example returns.
        aggregation: share of each token in the loss; 0 for one outside.
    """

    old_values: Tensor
    targets: Tensor
    aggregation: Tensor


class ValueModule(nn.Module):
    """From packed tokens, or from the policy's hidden states, to the values of the loss tokens.

    All values begin at 0.

    Args:
        model: the policy; its decoder is copied for the kind ``model``.
        kind: of critic.
    """

    def __init__(self, model: Any, kind: CriticKind) -> None:
        super().__init__()
        self.decoder: Any = None
        if kind == "model":
            self.decoder = copy.deepcopy(model.get_decoder()).requires_grad_(True)
        embedding = model.get_output_embeddings().weight
        self.head = nn.Linear(
            embedding.shape[-1], 1, dtype=embedding.dtype, device=embedding.device
        )
        self.start_at_zero()
        self._policy_prefix = f"{model.base_model_prefix}."

    def start_at_zero(self) -> None:
        """Set the head's weights."""
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def name_in_policy(self, name: str) -> str | None:
        """Return the policy's name for a parameter that begins as a copy of the policy's."""
        if not name.startswith("decoder."):
            return None
        return self._policy_prefix + name.removeprefix("decoder.")

    def forward(self, inputs: Microbatch | Tensor) -> Tensor:
        """Return ``[L]`` for a microbatch, or for hidden states ``[L, H]``."""
        hidden = inputs if isinstance(inputs, Tensor) else hidden_states(self.decoder, inputs)
        return self.head(hidden).squeeze(-1)


class Critic:
    """Values of tokens under the policy that sampled them, learned from the learner's targets.

    ::

        old_values = critic.values(microbatch)        # before the step
        targets = ValueTargets(...)
        loss = critic.update(microbatches, targets)   # None if it was not finite

    Args:
        policy: whose decoder is copied, or read.
        settings: how.
        ranks: of the learner group.
        sharding: how a decoder of its own lies in memory.
        fill: writes its initial weights if the policy has none yet.
    """

    def __init__(
        self,
        policy: PolicyModule,
        settings: CriticSettings,
        *,
        ranks: RankGroup,
        sharding: ShardingSettings | None = None,
        fill: FillParameters | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._reads_policy = settings.kind == "head"
        module = ValueModule(policy.model, settings.kind)
        is_sharded = False
        if self._reads_policy:
            module.to_empty(device=ranks.device)
        else:
            # Values need more precision than logits.
            place = replace(sharding or ShardingSettings(), float32_head=True)
            is_sharded = prepare(module, place, ranks, fill=fill, names=module.name_in_policy)
        module.start_at_zero()
        optimizer = OptimizerSettings(
            learning_rate=settings.learning_rate,
            betas=(0.9, 0.999),
            max_grad_norm=settings.max_grad_norm,
        )
        self.trainer = PolicyTrainer(module, optimizer, ranks=ranks, is_sharded=is_sharded)

    def values(self, microbatch: Microbatch) -> Tensor:
        """Return ``[L]``: the value before each loss token."""
        if not self._reads_policy:
            return self.trainer.module(microbatch)
        with torch.no_grad():
            hidden = token_hidden(self._policy, microbatch)
        return self.trainer.module(hidden)

    def update(self, microbatches: Sequence[Microbatch], targets: ValueTargets) -> float | None:
        """Take all optimizer steps on one minibatch; return the last loss, over all ranks.

        Returns None, with weights unchanged by that step, if loss or gradient is not finite.
        """
        loss = torch.zeros((), dtype=torch.float64)
        for _ in range(self._settings.updates):
            loss = self._backward(microbatches, targets)
            if self.trainer.apply(loss) is None:
                return None
        return float(loss)

    def _backward(self, microbatches: Sequence[Microbatch], targets: ValueTargets) -> Tensor:
        self.trainer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.trainer.ranks.device)
        for microbatch in microbatches:
            index = microbatch.index
            loss = clipped_value_loss(
                self.values(microbatch),
                old_values=targets.old_values[index],
                targets=targets.targets[index],
                clip=self._settings.clip,
            )
            share = (loss.loss * targets.aggregation[index]).sum()
            share.backward()
            total += share.detach().double()
        return total
