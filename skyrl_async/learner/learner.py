"""The learner: one batch of groups in, one policy version out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from skyrl_async.algorithms import advantages
from skyrl_async.algorithms.policy_loss import decoupled_ppo
from skyrl_async.learner.logprobs import token_logprobs
from skyrl_async.learner.packing import Microbatch, pack, split_evenly
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.step_metrics import StepSums
from skyrl_async.types import SampledBatch, StepResult, TrainSequence


class Ledger(Protocol):
    """Where the learner says what it spends its time on."""

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Charge the time inside the context to ``name``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How to train; see the configuration's sections of the same names for each meaning."""

    advantage: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_weight_cap: float = 2.0
    entropy_coefficient: float = 0.01
    num_minibatches: int = 2
    num_epochs: int = 1
    tokens_per_microbatch: int = 8192
    learning_rate: float = 2e-3
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class _Minibatch:
    """This rank's share of one minibatch, and what all ranks know of the whole."""

    microbatches: list[Microbatch]
    num_loss_tokens: int
    proximal_logprobs: list[Tensor] | None = None


class Learner:
    """Trains the policy, one step per batch.

    ::

        learner = Learner(model, LearnerSettings())
        while True:
            result = learner.step(buffer.sample(learner.policy_version))
            if not result.skipped:
                publish(snapshot_of(learner.model), result.policy_version)

    The proximal logprobs are those of the weights at the start of the step. For the first minibatch
    they are the ones that its own forward pass computes, because nothing has changed yet; the
    others get a pass of their own before the first optimizer step.

    Every rank is given the whole batch, forms the same minibatches from it and trains its share;
    gradients are sums of token terms divided by the number of loss tokens of the whole minibatch,
    so that any number of ranks and microbatches gives the same update.

    Args:
        model: causal LM; all its parameters that require gradients are trained.
        settings: how.
        ranks: of the learner group; one by default.
        ledger: told where the time goes.
    """

    def __init__(
        self,
        model: Any,
        settings: LearnerSettings,
        *,
        ranks: RankGroup | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.model = model
        self.policy_version = 0
        self.optimizer_steps = 0
        self._settings = settings
        self._ranks = ranks or RankGroup()
        self._ledger = ledger
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def step(self, batch: SampledBatch) -> StepResult:
        """Run all optimizer steps on ``batch``; on anything not finite, undo them and skip.

        Raises:
            RuntimeError: if the batch was sampled for another policy version.
        """
        if batch.train_version != self.policy_version:
            raise RuntimeError(
                f"batch was sampled for policy version {batch.train_version}, "
                f"the learner is at {self.policy_version}"
            )
        with self._part("prepare"):
            minibatches = self._minibatches(batch)
        with self._part("proximal"):
            self._compute_proximal(minibatches[1:])
        with self._part("train"):
            sums = self._train(minibatches)
        if sums is None:
            return StepResult(
                policy_version=self.policy_version,
                skipped=True,
                metrics={"optimizer_steps": float(self.optimizer_steps)},
                staleness_counts={},
            )
        self.policy_version += 1
        metrics = sums.metrics(self._ranks)
        metrics["optimizer_steps"] = float(self.optimizer_steps)
        metrics["policy/lr"] = self._optimizer.param_groups[0]["lr"]
        return StepResult(
            policy_version=self.policy_version,
            skipped=False,
            metrics=metrics,
            staleness_counts=_staleness_counts(minibatches, batch, self._ranks),
        )

    def _part(self, name: str) -> AbstractContextManager[Any]:
        return self._ledger.part(name) if self._ledger is not None else nullcontext()

    def _minibatches(self, batch: SampledBatch) -> list[_Minibatch]:
        estimator = getattr(advantages, self._settings.advantage)
        sequences = make_sequences(batch.groups, advantage=estimator)
        generator = np.random.default_rng([self._settings.seed, self.policy_version])
        order = generator.permutation(len(sequences))
        chunks = np.array_split(order, self._settings.num_minibatches)
        return [self._minibatch([sequences[i] for i in chunk]) for chunk in chunks if len(chunk)]

    def _minibatch(self, sequences: Sequence[TrainSequence]) -> _Minibatch:
        lengths = [len(s.token_ids) for s in sequences]
        share = split_evenly(lengths, num_parts=self._ranks.num_ranks)[self._ranks.rank]
        return _Minibatch(
            microbatches=pack(
                [sequences[i] for i in share],
                tokens_per_microbatch=self._settings.tokens_per_microbatch,
                dtype=self._parameters[0].dtype,
            ),
            num_loss_tokens=sum(int(s.loss_mask.sum()) for s in sequences),
        )

    @torch.no_grad()
    def _compute_proximal(self, minibatches: Sequence[_Minibatch]) -> None:
        for minibatch in minibatches:
            minibatch.proximal_logprobs = [
                token_logprobs(self.model, m)[0] for m in minibatch.microbatches
            ]

    def _train(self, minibatches: Sequence[_Minibatch]) -> StepSums | None:
        """Return the step's sums, or None if it was undone."""
        several = len(minibatches) * self._settings.num_epochs > 1
        undo = self._save_state() if several else None
        steps_before = self.optimizer_steps
        sums = StepSums(train_version=self.policy_version)
        for _ in range(self._settings.num_epochs):
            for minibatch in minibatches:
                loss = self._backward(minibatch, sums)
                if not self._apply(loss, sums):
                    if undo is not None and self.optimizer_steps > steps_before:
                        self._restore_state(*undo)
                    self.optimizer_steps = steps_before
                    return None
        return sums

    def _backward(self, minibatch: _Minibatch, sums: StepSums) -> Tensor:
        """Accumulate the gradient of one minibatch; gradient and loss are summed over ranks."""
        s = self._settings
        loss = torch.zeros((), dtype=torch.float64)
        self._optimizer.zero_grad(set_to_none=True)
        recorded: list[Tensor] = []
        proximal = minibatch.proximal_logprobs
        for index, microbatch in enumerate(minibatch.microbatches):
            logprobs, entropy = token_logprobs(self.model, microbatch)
            at_start = proximal[index] if proximal is not None else logprobs.detach()
            recorded.append(at_start)
            policy = decoupled_ppo(
                logprobs,
                proximal_logprobs=at_start,
                behavior_logprobs=microbatch.behavior_logprobs,
                advantages=microbatch.advantages,
                clip_low=s.clip_low,
                clip_high=s.clip_high,
                importance_weight_cap=s.importance_weight_cap,
            )
            total = policy.loss - s.entropy_coefficient * entropy.sum()
            (total / minibatch.num_loss_tokens).backward()
            loss += total.detach()
            sums.add(microbatch, policy, entropy, at_start)
        minibatch.proximal_logprobs = recorded
        self._ranks.sum_gradients(self._parameters)
        return self._ranks.sum_(loss)

    def _apply(self, loss: Tensor, sums: StepSums) -> bool:
        """Clip and take one optimizer step; False, and no step, if anything is not finite.

        Loss and gradient are sums over the ranks, so that all ranks decide alike.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        if not (torch.isfinite(norm) and torch.isfinite(loss)):
            self._optimizer.zero_grad(set_to_none=True)
            return False
        warmup = self._settings.warmup_steps
        scale = min(1.0, (self.optimizer_steps + 1) / warmup) if warmup else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * scale
        self._optimizer.step()
        self.optimizer_steps += 1
        sums.grad_norms.append(float(norm))
        return True

    def _save_state(self) -> tuple[list[Tensor], dict[str, Any]]:
        weights = [p.detach().clone() for p in self._parameters]
        return weights, copy.deepcopy(self._optimizer.state_dict())

    @torch.no_grad()
    def _restore_state(self, weights: list[Tensor], optimizer: dict[str, Any]) -> None:
        for parameter, saved in zip(self._parameters, weights, strict=True):
            parameter.copy_(saved)
        self._optimizer.load_state_dict(optimizer)
        if not optimizer["state"]:
            self._optimizer.state.clear()


def _staleness_counts(
    minibatches: Sequence[_Minibatch], batch: SampledBatch, ranks: RankGroup
) -> dict[int, int]:
    """Count the trained tokens of all ranks by staleness.

    Raises:
        RuntimeError: if a token is beyond the bound: the buffer's guarantee is checked where it
            matters.
    """
    oldest = min(g.min_trainable_version for g in batch.groups)
    bound = batch.train_version - oldest
    counts: Counter[int] = Counter()
    for minibatch in minibatches:
        for microbatch in minibatch.microbatches:
            lag = batch.train_version - microbatch.policy_versions
            values, numbers = lag.unique(return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    if counts and (max(counts) > bound or min(counts) < 0):
        raise RuntimeError(
            f"trained tokens with staleness {min(counts)}..{max(counts)}, bound 0..{bound} "
            f"at policy version {batch.train_version}"
        )
    if ranks.num_ranks > 1:
        table = torch.zeros(bound + 1, dtype=torch.int64)
        for staleness, number in counts.items():
            table[staleness] = number
        ranks.sum_(table)
        return {lag: int(n) for lag, n in enumerate(table.tolist()) if n}
    return dict(counts)
