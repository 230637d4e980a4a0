"""From the configuration's sections to the plain values that components take."""

from __future__ import annotations

import math

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.algorithms.distillation import DistillationSettings
from skyrl_async.algorithms.loss_by_name import find_loss
from skyrl_async.config import Config
from skyrl_async.config_algorithm import weight_kind
from skyrl_async.config_optimizer import OptimizerSection
from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import LearnerSettings
from skyrl_async.learner.lora import LoraSettings
from skyrl_async.learner.optimizer import OptimizerSettings, ParameterGroup
from skyrl_async.learner.policy import PolicySource
from skyrl_async.learner.sharding import ShardingSettings
from skyrl_async.types import Sampling


def policy_source(config: Config) -> PolicySource:
    """Return where the initial policy comes from; the same in every process of a run."""
    model = config.model
    return PolicySource(
        path=model.path,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        context_length=config.engine.context_length,
        dtype=model.dtype,
        seed=config.seed,
    )


def lora_settings(config: Config) -> LoraSettings | None:
    """Return which adapters are trained; None if all weights are."""
    lora = config.lora
    if not lora.rank:
        return None
    return LoraSettings(rank=lora.rank, alpha=lora.alpha, target_modules=tuple(lora.target_modules))


def teacher_source(config: Config) -> PolicySource:
    """Return where the teacher comes from, in the type that the learner computes in.

    Raises:
        ValueError: if there is no teacher.
    """
    path = config.distillation.teacher
    if path is None:
        raise ValueError("distillation.teacher is not set, so there is none")
    return PolicySource(path=path)


def sampling_settings(config: Config, *, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return how training samples."""
    sampling = config.sampling
    return Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=stop_token_ids,
    )


def algorithm_settings(config: Config) -> AlgorithmSettings:
    """Return which algorithm to train with.

    Raises:
        ValueError: if the loss cannot be imported.
    """
    algorithm, kl, critic = config.algorithm, config.kl, config.critic
    return AlgorithmSettings(
        advantage=algorithm.advantage,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        length_adaptive_alpha=algorithm.length_adaptive_alpha,
        rho_cap=algorithm.vtrace_rho_cap,
        c_cap=algorithm.vtrace_c_cap,
        whiten_advantages=algorithm.whiten_advantages,
        overlong_buffer_tokens=algorithm.overlong_buffer_tokens,
        max_tokens=config.engine.context_length,
        mask_truncated=algorithm.mask_truncated,
        proximal=algorithm.proximal,
        correction=correction_settings(config),
        loss=find_loss(algorithm.loss),
        loss_options=algorithm.loss_options,
        aggregation=algorithm.aggregation,
        aggregation_length=algorithm.aggregation_length,
        entropy_coefficient=algorithm.entropy_coefficient,
        squared_log_ratio_coefficient=algorithm.squared_log_ratio_coefficient,
        kl=KlSettings(coefficient=kl.coefficient, estimator=kl.estimator, placement=kl.placement),
        critic=None
        if critic.kind == "none"
        else CriticSettings(
            kind=critic.kind,
            learning_rate=critic.learning_rate,
            updates=critic.updates,
            clip=critic.clip,
            max_grad_norm=config.optimizer.max_grad_norm,
            bootstrap_truncated=critic.bootstrap_truncated,
        ),
        scale_rate_by_ess=algorithm.scale_rate_by_ess,
        distillation=distillation_settings(config),
    )


def correction_settings(config: Config) -> CorrectionSettings:
    """Return weights and masks."""
    correction = config.correction
    return CorrectionSettings(
        weight=weight_kind(config.algorithm, correction),
        weight_cap=correction.weight_cap,
        normalize_weights=correction.normalize,
        token_mask=_interval(correction.token_low, correction.token_high),
        sequence_mask=_interval(correction.sequence_low, correction.sequence_high),
        geometric_mask=_interval(correction.geometric_low, correction.geometric_high),
        veto_below=correction.veto_below,
        k2_limit=correction.k2_limit,
        k3_limit=correction.k3_limit,
        k_level=correction.k_level,
        opsm_delta=correction.opsm_delta,
        m2_limit=correction.m2_limit,
    )


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    if low is None and high is None:
        return None
    return (low or 0.0, math.inf if high is None else high)


def learner_settings(config: Config) -> LearnerSettings:
    """Return how to train."""
    learner = config.learner
    return LearnerSettings(
        algorithm=algorithm_settings(config),
        optimizer=optimizer_settings(config.optimizer, total_steps=config.optimizer_steps),
        sharding=ShardingSettings(
            compute_dtype=learner.compute_dtype,
            float32_head=learner.float32_head,
            activation_checkpointing=learner.activation_checkpointing,
            offload=learner.offload,
        ),
        num_minibatches=learner.num_minibatches,
        num_epochs=learner.num_epochs,
        tokens_per_microbatch=learner.tokens_per_microbatch,
        seed=config.seed,
    )


def optimizer_settings(optimizer: OptimizerSection, *, total_steps: int) -> OptimizerSettings:
    """Return how to update the weights.

    Args:
        optimizer: section of the configuration.
        total_steps: optimizer steps of the whole training.
    """
    return OptimizerSettings(
        learning_rate=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        warmup_steps=optimizer.warmup_steps,
        schedule=optimizer.schedule,
        total_steps=total_steps,
        min_rate_fraction=optimizer.min_rate_fraction,
        no_decay_on_vectors=optimizer.no_decay_on_vectors,
        groups=parameter_groups(optimizer),
    )


def parameter_groups(optimizer: OptimizerSection) -> tuple[ParameterGroup, ...]:
    """Return which parameters are trained differently from the rest."""
    return tuple(
        ParameterGroup(match=match, **values) for match, values in optimizer.groups.items()
    )


def distillation_settings(config: Config) -> DistillationSettings | None:
    """Return how much a teacher counts; None without one."""
    distillation = config.distillation
    if distillation.teacher is None:
        return None
    return DistillationSettings(
        coefficient=distillation.coefficient,
        reward_weight=distillation.reward_weight,
        max_log_ratio=distillation.max_log_ratio,
    )
