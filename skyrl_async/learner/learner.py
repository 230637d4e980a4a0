"""The learner: one batch of groups in, one policy version out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.algorithms.proximal import interpolated_proximal
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import Critic
from skyrl_async.learner.logprobs import TokenOutputs, token_logprobs, token_outputs
from skyrl_async.learner.loss_batch import LossBatch, gathered
from skyrl_async.learner.objective import objective
from skyrl_async.learner.off_policy_baseline import with_off_policy_baseline
from skyrl_async.learner.packing import Microbatch, first_loss_indices, pack, split_evenly
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.step_metrics import StepSums
from skyrl_async.learner.targets import Targets, make_targets
from skyrl_async.types import SampledBatch, StepResult, TrainSequence


class Ledger(Protocol):
    """Where the learner says what it spends its time on."""

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Charge the time inside the context to ``name``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How to train; see the configuration's sections of the same names for each meaning."""

    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
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
    """This rank's share of one minibatch, and what all ranks know of the whole.

    Attributes:
        microbatches: of this rank.
        tokens: of all ranks.
        targets: once they are made.
        proximal_logprobs: for each microbatch, once it had its first forward pass.
    """

    microbatches: list[Microbatch]
    tokens: LossBatch
    targets: Targets | None = None
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
    others get a pass of their own before the first optimizer step, and so does the first if masks,
    values or rewards depend on them.

    Every rank is given the whole batch, forms the same minibatches from it and trains its share;
    gradients are sums of token terms, each with its share in the whole minibatch, so that any
    number of ranks and microbatches gives the same update.

    Args:
        model: causal LM; all its parameters that require gradients are trained.
        settings: how.
        reference: the policy that a KL penalty holds on to; needed with one.
        ranks: of the learner group; one by default.
        ledger: told where the time goes.
    """

    def __init__(
        self,
        model: Any,
        settings: LearnerSettings,
        *,
        reference: Any | None = None,
        ranks: RankGroup | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if settings.algorithm.kl.coefficient and reference is None:
            raise ValueError("a KL penalty needs a reference policy, and there is none")
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
        self._rate_factor = 1.0
        self._remembered: tuple[list[Tensor], dict[str, Any], Any] | None = None
        self._reference = reference if settings.algorithm.kl.coefficient else None
        critic = settings.algorithm.critic
        self._critic = None if critic is None else Critic(model, critic, ranks=self._ranks)

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
            self._make_targets(minibatches)
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

    def remember(self) -> None:
        """Keep a copy of weights, critic and optimizers, in place of an older one."""
        self._remembered = self._save_state()

    def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and return that.

        Raises:
            RuntimeError: if there is no copy.
        """
        if self._remembered is None:
            raise RuntimeError("there is no state to roll back to: remember one first")
        self._restore_state(*self._remembered)
        # The optimizer now owns the moments of the copy, which must outlive further steps.
        self._remembered = self._save_state()
        self.policy_version += 1
        return self.policy_version

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps.

        Raises:
            ValueError: if the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"the factor of the learning rate must be > 0, got {factor}")
        self._rate_factor *= factor

    def _part(self, name: str) -> AbstractContextManager[Any]:
        return self._ledger.part(name) if self._ledger is not None else nullcontext()

    def _minibatches(self, batch: SampledBatch) -> list[_Minibatch]:
        algorithm = self._settings.algorithm
        # What needs values or gradients replaces what this gives.
        later = algorithm.needs_values or algorithm.needs_gradient_norms
        name = "mean_centered" if later else algorithm.advantage
        sequences = make_sequences(
            batch.groups,
            advantage=partial(estimate, name),
            overlong_buffer_tokens=algorithm.overlong_buffer_tokens,
            max_tokens=algorithm.max_tokens,
        )
        if algorithm.needs_gradient_norms:
            sequences = with_off_policy_baseline(
                sequences,
                self.model,
                ranks=self._ranks,
                weight_cap=algorithm.correction.weight_cap,
            )
        generator = np.random.default_rng([self._settings.seed, self.policy_version])
        order = generator.permutation(len(sequences))
        chunks = np.array_split(order, self._settings.num_minibatches)
        return [self._minibatch([sequences[i] for i in chunk]) for chunk in chunks if len(chunk)]

    def _minibatch(self, sequences: Sequence[TrainSequence]) -> _Minibatch:
        lengths = [len(s.token_ids) for s in sequences]
        share = split_evenly(lengths, num_parts=self._ranks.num_ranks)[self._ranks.rank]
        first_indices = first_loss_indices(sequences)
        dtype = self._parameters[0].dtype
        return _Minibatch(
            microbatches=pack(
                [sequences[i] for i in share],
                tokens_per_microbatch=self._settings.tokens_per_microbatch,
                dtype=dtype,
                first_indices=[first_indices[i] for i in share],
            ),
            tokens=LossBatch.of(sequences, dtype=dtype),
        )

    @torch.no_grad()
    def _make_targets(self, minibatches: Sequence[_Minibatch]) -> None:
        """Do every forward pass that must come before the first optimizer step."""
        algorithm, reference, critic = self._settings.algorithm, self._reference, self._critic
        for number, minibatch in enumerate(minibatches):
            proximal = values = at_reference = None
            if algorithm.needs_whole_batch:
                proximal = self._gather(partial(token_logprobs, self.model), minibatch)
            elif number and algorithm.proximal == "recomputed":
                minibatch.proximal_logprobs = [
                    token_logprobs(self.model, m) for m in minibatch.microbatches
                ]
            if reference is not None:
                at_reference = self._gather(partial(token_logprobs, reference), minibatch)
            if critic is not None:
                values = self._gather(critic.values, minibatch)
            minibatch.targets = make_targets(
                minibatch.tokens,
                algorithm,
                proximal_logprobs=proximal,
                reference_logprobs=at_reference,
                values=values,
            )
            if proximal is not None:
                minibatch.proximal_logprobs = [proximal[m.index] for m in minibatch.microbatches]

    def _gather(self, compute: Callable[[Microbatch], Tensor], minibatch: _Minibatch) -> Tensor:
        return gathered(
            compute,
            minibatch.microbatches,
            like=minibatch.tokens.behavior_logprobs,
            ranks=self._ranks,
        )

    def _train(self, minibatches: Sequence[_Minibatch]) -> StepSums | None:
        """Return the step's sums, or None if it was undone."""
        several = len(minibatches) * self._settings.num_epochs > 1 or self._critic is not None
        undo = self._save_state() if several else None
        steps_before = self.optimizer_steps
        sums = StepSums(train_version=self.policy_version)
        for _ in range(self._settings.num_epochs):
            for minibatch in minibatches:
                if not self._optimize(minibatch, sums):
                    if undo is not None:
                        self._restore_state(*undo)
                    self.optimizer_steps = steps_before
                    return None
        return sums

    def _optimize(self, minibatch: _Minibatch, sums: StepSums) -> bool:
        """Train critic and policy on one minibatch; False if anything was not finite."""
        targets = minibatch.targets
        assert targets is not None, "targets are made before training"
        if self._critic is not None and targets.values is not None:
            value_loss = self._critic.update(minibatch.microbatches, targets.values)
            if value_loss is None:
                return False
            sums.value_losses.append(value_loss)
        loss = self._backward(minibatch, targets, sums)
        return self._apply(loss, sums, rate_scale=self._rate_scale(targets))

    def _backward(self, minibatch: _Minibatch, targets: Targets, sums: StepSums) -> Tensor:
        """Accumulate the gradient of one minibatch; gradient and loss are summed over ranks."""
        loss = torch.zeros((), dtype=torch.float64)
        self._optimizer.zero_grad(set_to_none=True)
        recorded: list[Tensor] = []
        known = minibatch.proximal_logprobs
        for number, microbatch in enumerate(minibatch.microbatches):
            outputs = token_outputs(self.model, microbatch)
            proximal = known[number] if known is not None else self._proximal(outputs, microbatch)
            recorded.append(proximal)
            result = objective(
                outputs,
                microbatch,
                minibatch.tokens,
                targets,
                proximal_logprobs=proximal,
                settings=self._settings.algorithm,
            )
            result.total.backward()
            loss += result.total.detach()
            sums.add(microbatch, result, proximal)
        if self._settings.algorithm.proximal == "recomputed":
            minibatch.proximal_logprobs = recorded
        self._ranks.sum_gradients(self._parameters)
        return self._ranks.sum_(loss)

    def _proximal(self, outputs: TokenOutputs, microbatch: Microbatch) -> Tensor:
        """Return the proximal logprobs of a microbatch that has none yet."""
        if self._settings.algorithm.proximal == "recomputed":
            return outputs.logprobs.detach()
        return interpolated_proximal(
            outputs.logprobs,
            microbatch.behavior_logprobs,
            policy_versions=microbatch.policy_versions,
            current_version=self.policy_version + 1,
            proximal_version=self.policy_version,
        )

    def _rate_scale(self, targets: Targets) -> float:
        """Return the root of the effective sample fraction of a minibatch, if it is asked for."""
        correction = targets.correction
        if not self._settings.algorithm.scale_rate_by_ess or correction is None:
            return 1.0
        weights = correction.weights[correction.mask].double()
        squared = float(weights.square().sum())
        return float(weights.sum()) / (squared * len(weights)) ** 0.5 if squared else 1.0

    def _apply(self, loss: Tensor, sums: StepSums, *, rate_scale: float = 1.0) -> bool:
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
            group["lr"] = self._settings.learning_rate * scale * rate_scale * self._rate_factor
        self._optimizer.step()
        self.optimizer_steps += 1
        sums.grad_norms.append(float(norm))
        return True

    def _save_state(self) -> tuple[list[Tensor], dict[str, Any], Any]:
        weights = [p.detach().clone() for p in self._parameters]
        critic = None if self._critic is None else self._critic.save_state()
        return weights, copy.deepcopy(self._optimizer.state_dict()), critic

    @torch.no_grad()
    def _restore_state(self, weights: list[Tensor], optimizer: dict[str, Any], critic: Any) -> None:
        for parameter, saved in zip(self._parameters, weights, strict=True):
            parameter.copy_(saved)
        self._optimizer.load_state_dict(optimizer)
        if self._critic is not None:
            self._critic.restore_state(*critic)


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
