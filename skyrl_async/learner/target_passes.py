"""Every forward pass that must come before the first optimizer step of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skyrl_async.algorithms.distillation import on_policy_distillation
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import Critic
from skyrl_async.learner.critic_bootstrap import values_after
from skyrl_async.learner.logprobs import PolicyModule, token_logprobs
from skyrl_async.learner.lora import reference_policy
from skyrl_async.learner.loss_batch import gathered
from skyrl_async.learner.minibatches import Minibatch, PackingSettings
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.policy_trainer import PolicyTrainer
from skyrl_async.learner.targets import make_targets


class TargetPasses:
    """Runs policy, critic, reference and teacher over the minibatches, as far as they are needed.

    Args:
        trainer: of the policy.
        settings: what to minimize.
        packing: of a rank's share.
        critic: None without one.
        reference: that a KL penalty holds on to; None if it is the policy without its adapter.
        teacher: None without a distillation.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        settings: AlgorithmSettings,
        *,
        packing: PackingSettings,
        critic: Critic | None,
        reference: PolicyModule | None,
        teacher: PolicyModule | None,
    ) -> None:
        self._trainer = trainer
        self._policy: Any = trainer.module
        self._packing = packing
        self._settings = settings
        self._critic = critic
        self._reference = reference
        self._teacher = teacher

    @torch.no_grad()
    def run(self, minibatches: Sequence[Minibatch]) -> None:
        """Give every minibatch its targets, and proximal logprobs where its training has none."""
        settings = self._settings
        for number, minibatch in enumerate(minibatches):
            proximal = values = after = reference = None
            if settings.needs_whole_batch:
                proximal = self._gather(partial(token_logprobs, self._policy), minibatch)
            elif number and settings.proximal == "recomputed":
                minibatch.proximal_logprobs = [
                    token_logprobs(self._policy, m) for m in minibatch.microbatches
                ]
            if settings.kl.coefficient:
                reference = self._reference_logprobs(minibatch)
            if self._critic is not None:
                values = self._gather(self._critic.values, minibatch)
            if self._critic is not None and settings.bootstraps:
                after = values_after(
                    self._critic,
                    minibatch.sequences,
                    [s.truncated for s in minibatch.sequences],
                    trainer=self._trainer,
                    packing=self._packing,
                )
            minibatch.targets = make_targets(
                minibatch.tokens,
                settings,
                proximal_logprobs=proximal,
                reference_logprobs=reference,
                values=values,
                bootstrap_values=after,
            )
            if proximal is not None:
                minibatch.proximal_logprobs = [proximal[m.index] for m in minibatch.microbatches]
                self._ask_teacher(minibatch, proximal)

    def _ask_teacher(self, minibatch: Minibatch, proximal_logprobs: Tensor) -> None:
        """Let a teacher, if there is one, judge every token."""
        distillation, targets = self._settings.distillation, minibatch.targets
        if self._teacher is None or distillation is None or targets is None:
            return
        teacher_logprobs = self._gather(partial(token_logprobs, self._teacher), minibatch)
        advantages = on_policy_distillation(
            targets.advantages,
            student_logprobs=proximal_logprobs,
            teacher_logprobs=teacher_logprobs,
            settings=distillation,
        )
        minibatch.targets = replace(
            targets,
            advantages=advantages,
            teacher_divergence=float((proximal_logprobs - teacher_logprobs).mean()),
        )

    def _reference_logprobs(self, minibatch: Minibatch) -> Tensor:
        if self._reference is not None:
            return self._gather(partial(token_logprobs, self._reference), minibatch)
        with reference_policy(self._policy.model):
            return self._gather(partial(token_logprobs, self._policy), minibatch)

    def _gather(self, compute: Callable[[Microbatch], Tensor], minibatch: Minibatch) -> Tensor:
        return gathered(
            compute,
            minibatch.microbatches,
            like=minibatch.tokens.behavior_logprobs,
            ranks=self._trainer.ranks,
        )
