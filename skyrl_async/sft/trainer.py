"""Imitation: the mean negative log-probability of the replies, on one rank of the learner group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_async.learner.learner import Learner
from skyrl_async.learner.logprobs import token_outputs
from skyrl_async.learner.minibatches import Minibatch, make_minibatches
from skyrl_async.learner.time_parts import Ledger, NullLedger
from skyrl_async.types import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank.

    Attributes:
        loss: mean over the loss tokens of the batch, in nats, before the step.
        entropy: of the policy at the same tokens, in nats.
        grad_norm: before clipping; None if the step was skipped, as it or the loss was not finite.
        num_tokens: with loss.
    """

    loss: float
    entropy: float
    grad_norm: float | None
    num_tokens: int


class DemonstrationTrainer:
    r"""Trains a learner's policy to say what demonstrations say.

    .. math::

        L = -\frac1N \sum_t \log\pi_\theta(y_t)

    over the :math:`N` loss tokens of the batch, those of all ranks. Every token counts equally, so
    that any split over ranks and microbatches gives the same gradient.

    ::

        trainer = DemonstrationTrainer(learner)
        outcome = trainer.step(batch)
        loss = trainer.mean_loss(held_out)

    All ranks call the methods with the same arguments.

    Args:
        learner: with the policy and its optimizer; its algorithm has no part in this.
        ledger: told where the time of a step goes: ``train`` with its forward and backward passes,
            ``step``, and whatever part runs around them.
    """

    def __init__(self, learner: Learner, *, ledger: Ledger | None = None) -> None:
        self._learner = learner
        self._trainer = learner.trainer
        self._ranks = learner.trainer.ranks
        self._ledger = ledger or NullLedger()

    def step(self, sequences: Sequence[TrainSequence]) -> StepOutcome:
        """Take one optimizer step on a batch; count it as a policy version of the learner."""
        minibatch = self._minibatch(sequences)
        count = _num_tokens(minibatch)
        with self._ledger.part("train"):
            loss, entropy = self._accumulate(minibatch, count)
        with self._ledger.part("step"):
            grad_norm = self._trainer.apply(loss)
        self._learner.policy_version += 1
        return StepOutcome(
            loss=float(loss),
            entropy=float(self._ranks.sum_(entropy)),
            grad_norm=grad_norm,
            num_tokens=count,
        )

    def _accumulate(self, minibatch: Minibatch, count: int) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient; return this rank's parts of the mean loss and entropy."""
        loss, entropy = torch.zeros(2, dtype=torch.float64, device=self._ranks.device).unbind()
        self._trainer.zero_grad()
        for microbatch in minibatch.microbatches:
            with self._ledger.detail("forward"):
                outputs = token_outputs(self._trainer.module, microbatch)
                part = -outputs.logprobs.sum() / count
            with self._ledger.detail("backward"):
                part.backward()
            if self._ranks.counts:
                loss += part.detach()
                entropy += outputs.entropy.detach().sum() / count
        return loss, entropy

    @torch.no_grad()
    def mean_loss(self, sequences: Sequence[TrainSequence]) -> float:
        """Return the mean negative log-probability of all loss tokens, in nats."""
        minibatch = self._minibatch(sequences)
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for microbatch in minibatch.microbatches:
            outputs = token_outputs(self._trainer.module, microbatch)
            if self._ranks.counts:
                total -= outputs.logprobs.sum()
        return float(self._ranks.sum_(total)) / _num_tokens(minibatch)

    def _minibatch(self, sequences: Sequence[TrainSequence]) -> Minibatch:
        (minibatch,) = make_minibatches(
            sequences,
            num_minibatches=1,
            seed=(0,),
            packing=self._learner.packing,
            trainer=self._trainer,
        )
        return minibatch


def _num_tokens(minibatch: Minibatch) -> int:
    return minibatch.tokens.behavior_logprobs.numel()
