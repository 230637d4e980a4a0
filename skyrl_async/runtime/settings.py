"""From the configuration's sections to the plain values that components take."""

from __future__ import annotations

import math
from typing import Any

from skyrl_async.algorithms.catalogue import find_loss
from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.config import Config
from skyrl_async.config_algorithm import weight_kind
from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import LearnerSettings
from skyrl_async.learner.policy import PolicySource
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
        proximal=algorithm.proximal,
        correction=correction_settings(config),
        loss=find_loss(algorithm.loss),
        loss_options=algorithm.loss_options,
        aggregation=algorithm.aggregation,
        aggregation_length=algorithm.aggregation_length,
        entropy_coefficient=algorithm.entropy_coefficient,
        kl=KlSettings(coefficient=kl.coefficient, estimator=kl.estimator, placement=kl.placement),
        critic=None
        if critic.kind == "none"
        else CriticSettings(
            kind=critic.kind,
            learning_rate=critic.learning_rate,
            updates=critic.updates,
            clip=critic.clip,
            max_grad_norm=config.optimizer.max_grad_norm,
        ),
        scale_rate_by_ess=algorithm.scale_rate_by_ess,
    )


def correction_settings(config: Config) -> CorrectionSettings:
    """Return weights and masks."""
    correction = config.correction
    weight: Any = weight_kind(config.algorithm, correction)
    return CorrectionSettings(
        weight=weight,
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
    learner, optimizer = config.learner, config.optimizer
    return LearnerSettings(
        algorithm=algorithm_settings(config),
        num_minibatches=learner.num_minibatches,
        num_epochs=learner.num_epochs,
        tokens_per_microbatch=learner.tokens_per_microbatch,
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        seed=config.seed,
    )
