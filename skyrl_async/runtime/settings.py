"""From the configuration's sections to the plain values that components take."""

from __future__ import annotations

from skyrl_async.config import Config
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


def learner_settings(config: Config) -> LearnerSettings:
    """Return how to train."""
    learner, optimizer, algorithm = config.learner, config.optimizer, config.algorithm
    return LearnerSettings(
        advantage=algorithm.advantage,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        importance_weight_cap=algorithm.importance_weight_cap,
        entropy_coefficient=algorithm.entropy_coefficient,
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
