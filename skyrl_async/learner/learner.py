"""The learner: one batch of groups in, one policy version out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.algorithms.proximal import interpolated_proximal
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.attention import AttentionKind, use_attention
from skyrl_async.learner.critic import Critic
from skyrl_async.learner.logprobs import (
    PolicyModule,
    TokenOutputs,
    token_outputs,
)
from skyrl_async.learner.lora import adapter_name, base_name, has_adapter
from skyrl_async.learner.minibatches import Minibatch, PackingSettings, make_minibatches
from skyrl_async.learner.objective import objective
from skyrl_async.learner.off_policy_baseline import with_off_policy_baseline
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.packing import Microbatch, pair_cost_of
from skyrl_async.learner.policy_trainer import PolicyTrainer
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.sharding import FillParameters, ShardingSettings, prepare
from skyrl_async.learner.step_metrics import StepSums, count_staleness
from skyrl_async.learner.target_passes import TargetPasses
from skyrl_async.learner.targets import Targets
from skyrl_async.learner.time_parts import Ledger, NullLedger
from skyrl_async.learner.training_state import TrainingState
from skyrl_async.types import SampledBatch, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How to train; see the configuration's sections of the same names for each meaning."""

    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    sharding: ShardingSettings = field(default_factory=ShardingSettings)
    num_minibatches: int = 2
    num_epochs: int = 1
    tokens_per_microbatch: int = 8192
    attention: AttentionKind = "sdpa"
    seed: int = 0


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
        model: causal LM; all its parameters that require gradients are trained. With ``fill`` they
            may be on the meta device.
        settings: how.
        reference: the policy that a KL penalty holds on to; needed with one, unless the model has
            an adapter, without which it is the reference itself.
        teacher: whose logprobs the policy learns from; needed for a distillation.
        ranks: of the learner group; one by default.
        ledger: told where the time goes.
        fill: writes the initial weights into the parameters of policy, reference and critic.

    Attributes:
        policy_version: steps finished.
        trainer: of the policy.
        packing: how its microbatches are laid out.
        critic: None without one.
        observer: called with the minibatches of every step, once their targets are made.
    """

    def __init__(
        self,
        model: Any,
        settings: LearnerSettings,
        *,
        reference: Any | None = None,
        teacher: Any | None = None,
        ranks: RankGroup | None = None,
        ledger: Ledger | None = None,
        fill: FillParameters | None = None,
    ) -> None:
        adapted = has_adapter(model)
        if settings.algorithm.kl.coefficient and reference is None and not adapted:
            raise ValueError("a KL penalty needs a reference policy, and there is none")
        if settings.algorithm.distillation is not None and teacher is None:
            raise ValueError("a distillation needs a teacher, and there is none")
        self.policy_version = 0
        self.observer: Callable[[Sequence[Minibatch]], None] | None = None
        self._settings = settings
        self._ranks = ranks or RankGroup()
        self._ledger = ledger or NullLedger()
        sharding, critic = settings.sharding, settings.algorithm.critic
        flat = settings.attention != "sdpa" or self._ranks.sequence_ranks > 1
        self.packing = PackingSettings(
            tokens_per_microbatch=settings.tokens_per_microbatch,
            layout="flat" if flat else "auto",
            pair_cost=pair_cost_of(model.config),
        )
        policy = self._policy_module(model)
        # A critic copies the policy's decoder, which it must not when that is sharded.
        self.critic = None
        if critic is not None:
            self.critic = Critic(policy, critic, ranks=self._ranks, sharding=sharding, fill=fill)
        self.trainer = PolicyTrainer(
            policy,
            settings.optimizer,
            ranks=self._ranks,
            is_sharded=self._prepare(policy, fill),
            flat_rows=flat,
        )
        frozen: dict[str, PolicyModule | None] = {"reference": None, "teacher": None}
        if settings.algorithm.kl.coefficient and not adapted:
            frozen["reference"] = self._frozen(reference, fill)
        if settings.algorithm.distillation is not None:
            frozen["teacher"] = self._frozen(teacher, None)
        self._target_passes = TargetPasses(
            self.trainer, settings.algorithm, packing=self.packing, critic=self.critic, **frozen
        )
        self._remembered: tuple[Any, Any] | None = None

    def _policy_module(self, model: Any) -> PolicyModule:
        use_attention(model, self._settings.attention)
        return PolicyModule(
            model,
            float32_head=self._settings.sharding.float32_head,
            sequence_group=self._ranks.sequence_group,
        )

    def _frozen(self, model: Any, fill: FillParameters | None) -> PolicyModule:
        policy = self._policy_module(model).requires_grad_(False)
        self._prepare(policy, fill)
        return policy

    def _prepare(self, policy: PolicyModule, fill: FillParameters | None) -> bool:
        adapters = [p for name, p in policy.named_parameters() if adapter_name(name) is not None]
        return prepare(
            policy,
            self._settings.sharding,
            self._ranks,
            fill=fill,
            names=lambda name: base_name(name.removeprefix("model.")),
            whole=adapters,
        )

    @property
    def model(self) -> Any:
        """The causal LM that is trained."""
        return self.trainer.module.model

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far."""
        return self.trainer.optimizer_steps

    def step(self, batch: SampledBatch) -> StepResult:
        """Run all optimizer steps on ``batch``.

        A minibatch whose loss or gradient is not finite is left out; if that is all of them, the
        step is skipped and makes no version.

        Raises:
            RuntimeError: if the batch was sampled for another policy version.
        """
        if batch.train_version != self.policy_version:
            raise RuntimeError(
                f"batch was sampled for policy version {batch.train_version}, "
                f"the learner is at {self.policy_version}"
            )
        with self._ledger.part("prepare"):
            minibatches = self._minibatches(batch)
        with self._ledger.part("proximal"):
            self._target_passes.run(minibatches)
        if self.observer is not None:
            self.observer(minibatches)
        with self._ledger.part("train"):
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
        metrics["policy/lr"] = self.trainer.learning_rate
        return StepResult(
            policy_version=self.policy_version,
            skipped=False,
            metrics=metrics,
            staleness_counts=count_staleness(
                [m for minibatch in minibatches for m in minibatch.microbatches],
                batch,
                ranks=self._ranks,
            ),
        )

    def remember(self) -> None:
        """Keep a copy of weights, critic and optimizers, in place of an older one."""
        critic = None if self.critic is None else self.critic.trainer.save_state()
        self._remembered = (self.trainer.save_state(), critic)

    def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and return that.

        Raises:
            RuntimeError: if there is no copy.
        """
        if self._remembered is None:
            raise RuntimeError("there is no state to roll back to: remember one first")
        policy, critic = self._remembered
        self.trainer.restore_state(*policy)
        if self.critic is not None:
            self.critic.trainer.restore_state(*critic)
        self.policy_version += 1
        return self.policy_version

    def training_state(self) -> TrainingState:
        """Return what a checkpoint holds; modules and optimizers are this learner's own."""
        critic = None if self.critic is None else self.critic.trainer
        return TrainingState(
            module=self.trainer.module,
            optimizer=self.trainer.optimizer,
            critic_module=None if critic is None else critic.module,
            critic_optimizer=None if critic is None else critic.optimizer,
            counters={
                "policy_version": self.policy_version,
                "optimizer_steps": self.trainer.optimizer_steps,
                "rate_factor": self.trainer.rate_factor,
                "critic_optimizer_steps": 0 if critic is None else critic.optimizer_steps,
                "critic_rate_factor": 1.0 if critic is None else critic.rate_factor,
            },
        )

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """Go on from the counters of a :meth:`training_state` whose tensors were loaded.

        Raises:
            KeyError: if one is missing.
        """
        self.policy_version = int(counters["policy_version"])
        self.trainer.optimizer_steps = int(counters["optimizer_steps"])
        self.trainer.rate_factor = float(counters["rate_factor"])
        if self.critic is not None:
            self.critic.trainer.optimizer_steps = int(counters["critic_optimizer_steps"])
            self.critic.trainer.rate_factor = float(counters.get("critic_rate_factor", 1.0))

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rates of all later steps, of policy and critic.

        Raises:
            ValueError: if the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"the factor of the learning rate must be > 0, got {factor}")
        self.trainer.rate_factor *= factor
        if self.critic is not None:
            self.critic.trainer.rate_factor *= factor

    def _minibatches(self, batch: SampledBatch) -> list[Minibatch]:
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
                self.trainer.module,
                ranks=self._ranks,
                weight_cap=algorithm.correction.weight_cap,
            )
        return make_minibatches(
            sequences,
            num_minibatches=self._settings.num_minibatches,
            seed=(self._settings.seed, self.policy_version),
            packing=self.packing,
            trainer=self.trainer,
        )

    def _train(self, minibatches: Sequence[Minibatch]) -> StepSums | None:
        """Return the step's sums, or None if no minibatch could be used."""
        sums = StepSums(train_version=self.policy_version, device=self._ranks.device)
        for _ in range(self._settings.num_epochs):
            for minibatch in minibatches:
                self._optimize(minibatch, sums)
        return sums if sums.grad_norms else None

    def _optimize(self, minibatch: Minibatch, sums: StepSums) -> None:
        """Train critic and policy on one minibatch; on anything not finite, leave it out."""
        targets = minibatch.targets
        assert targets is not None, "targets are made before training"
        if self.critic is not None and targets.values is not None:
            value_loss = self.critic.update(minibatch.microbatches, targets.values)
            if value_loss is None:
                sums.skipped_minibatches += 1
                return
            sums.value_losses.append(value_loss)
        added = StepSums(train_version=self.policy_version, device=self._ranks.device)
        loss = self._backward(minibatch, targets, added, is_first=not sums.grad_norms)
        with self._ledger.part("step"):
            norm = self.trainer.apply(loss, rate_scale=targets.rate_scale)
        if norm is None:
            sums.skipped_minibatches += 1
            return
        sums.merge(added, grad_norm=norm)
        if targets.teacher_divergence is not None:
            sums.teacher_divergences.append(targets.teacher_divergence)

    def _backward(
        self, minibatch: Minibatch, targets: Targets, sums: StepSums, *, is_first: bool
    ) -> Tensor:
        """Accumulate the gradient of one minibatch; return this rank's part of its loss.

        The first one still has the weights of the start of the step.
        """
        recomputed = self._settings.algorithm.proximal == "recomputed"
        loss = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        self.trainer.zero_grad()
        recorded: list[Tensor] = []
        known = minibatch.proximal_logprobs
        for number, microbatch in enumerate(minibatch.microbatches):
            with self._ledger.detail("forward"):
                outputs = token_outputs(self.trainer.module, microbatch)
                proximal = known[number] if known else self._proximal(outputs, microbatch)
                recorded.append(proximal)
                result = objective(
                    outputs,
                    microbatch,
                    minibatch.tokens,
                    targets,
                    proximal_logprobs=proximal,
                    settings=self._settings.algorithm,
                )
            with self._ledger.detail("backward"):
                result.total.backward()
            if self._ranks.counts:
                loss += result.total.detach()
                exact = outputs.logprobs.detach() if is_first else None
                sums.add(microbatch, result, at_start=proximal if recomputed else exact)
        if recomputed:
            minibatch.proximal_logprobs = recorded
        return loss

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
