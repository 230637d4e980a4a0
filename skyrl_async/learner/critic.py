"""The critic: the value of the state before each loss token, and how it is trained.

Shapes: ``L`` loss tokens of a microbatch, ``T`` of a minibatch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skyrl_async.algorithms.value_loss import clipped_value_loss
from skyrl_async.learner.logprobs import hidden_states
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.rank_group import RankGroup

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
    """

    kind: CriticKind = "model"
    learning_rate: float = 2e-3
    updates: int = 1
    clip: float | None = 0.2
    max_grad_norm: float = 1.0


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
    """

    def __init__(self, policy: Any, settings: CriticSettings, *, ranks: RankGroup) -> None:
        self._settings = settings
        self._ranks = ranks
        self._reads_policy = settings.kind == "head"
        self._decoder = policy.get_decoder()
        if not self._reads_policy:
            self._decoder = copy.deepcopy(self._decoder).requires_grad_(True)
        embedding = policy.get_output_embeddings().weight
        self._head = torch.nn.Linear(
            embedding.shape[-1], 1, dtype=embedding.dtype, device=embedding.device
        )
        # All values begin at 0, on every rank.
        torch.nn.init.zeros_(self._head.weight)
        torch.nn.init.zeros_(self._head.bias)
        trunk = [] if self._reads_policy else [p for _, p in self._decoder.named_parameters()]
        self._parameters: list[torch.nn.Parameter] = [*trunk, *self._head.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=0.0
        )

    def values(self, microbatch: Microbatch) -> Tensor:
        """Return ``[L]``: the value before each loss token."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._reads_policy):
            hidden = hidden_states(self._decoder, microbatch)
        return self._head(hidden).squeeze(-1)

    def update(self, microbatches: Sequence[Microbatch], targets: ValueTargets) -> float | None:
        """Take all optimizer steps on one minibatch; return the last loss, over all ranks.

        Returns None, with weights unchanged by that step, if loss or gradient is not finite.
        """
        loss = torch.zeros(())
        for _ in range(self._settings.updates):
            loss = self._backward(microbatches, targets)
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
            if not (torch.isfinite(norm) and torch.isfinite(loss)):
                return None
            self._optimizer.step()
        return float(loss)

    def _backward(self, microbatches: Sequence[Microbatch], targets: ValueTargets) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
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
        self._ranks.sum_gradients(self._parameters)
        return self._ranks.sum_(total)

    def save_state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Return copies of weights and moments."""
        weights = [p.detach().clone() for p in self._parameters]
        return weights, copy.deepcopy(self._optimizer.state_dict())

    @torch.no_grad()
    def restore_state(self, weights: Sequence[Tensor], optimizer: dict[str, Any]) -> None:
        """Go back to what :meth:`save_state` returned."""
        for parameter, saved in zip(self._parameters, weights, strict=True):
            parameter.copy_(saved)
        self._optimizer.load_state_dict(optimizer)
