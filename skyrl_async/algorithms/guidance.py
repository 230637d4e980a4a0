"""When each method of the catalogue helps, in a few words, and how a run is told to use it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

WHEN_IT_HELPS: Mapping[str, str] = MappingProxyType(
    {
        "mean_centered": "a safe default for groups; rare failures get no outsized weight",
        "grpo": "groups whose rewards differ in scale between tasks",
        "rloo": "small groups: the baseline of a member leaves its own reward out",
        "max_rl": "hard tasks with few successes, which it weighs most",
        "optimal_off_policy_baseline": "very stale data, if gradient norms can be afforded",
        "batch_normalized": "one scale for the whole batch, however the groups differ",
        "reinforce_plus_plus": "no groups: the batch is the baseline",
        "reinforce_plus_plus_baseline": "groups of one task, one scale for the batch",
        "global_baseline": "groups of one trajectory",
        "gae": "long replies with a critic that predicts well; tool outputs are no steps",
        "length_adaptive_lambdas": "replies of very different lengths with a critic",
        "turn_level_gae": "many short turns: credit per turn, not per token",
        "vtrace": "a critic and stale data: corrects its targets, with bounded variance",
        "retrace": "as vtrace, with longer traces for likely tokens",
        "reinforce_plus_plus_returns": "a KL penalty without a critic, charged token by token",
        "ppo_clip": "the default; with the importance weight it is decoupled PPO",
        "dual_clip": "large negative advantages on tokens that became likely",
        "cispo": "long replies whose rare, decisive tokens a clip would silence",
        "sapo": "a clip without a hard edge",
        "reinforce": "one optimizer step per batch, nothing to clip",
        "kimi_squared_log": "a soft pull to the start of the step in place of a clip",
        "gspo": "mixture-of-experts models, whose token ratios are noisy",
        "gmpo": "outliers among token ratios",
        "vespo": "batches trained many times over; weighs sequences smoothly",
        "topr": "many failures among stale data: they are tapered, successes are kept",
        "ppo_behavior": "an uncorrected baseline: clipping ties the policy to the old one",
        "reinforce_is": "no proximal policy: one weight from behavior to current",
        "aipo": "the same with a wide cap",
        "dppo_tv": "probable tokens, whose ratios hide how much probability moves",
        "dppo_kl": "the same, measured as a divergence",
        "m2po": "data of many updates ago",
        "double_sided": "asynchronous agents without groups or a proximal policy",
        "topr_token": "topr for long sequences, whose product of ratios vanishes",
        "token_weights": "the default correction: little variance, some bias",
        "sequence_weights": "short sequences, where the unbiased product is affordable",
        "geometric_weights": "long sequences, where it is not",
        "normalize_weights": "keeping the size of the step independent of staleness",
        "finite_mask": "engines that report NaN or infinity",
        "token_mask": "engine and learner disagree on single tokens",
        "sequence_mask": "the same on short sequences",
        "geometric_mask": "the same on long ones, whatever their length",
        "veto_mask": "one impossible token spoils its sequence",
        "k2_mask": "a symmetric limit, in nats squared",
        "k3_mask": "a limit in nats of divergence",
        "opsm_mask": "stale failures push probability to nowhere in particular",
        "interpolated_proximal": "saving the forward pass of the proximal policy",
        "aggregation_weights": "long replies against short ones, easy prompts against hard ones",
        "k1": "in rewards only",
        "k2": "a loss term with the right gradient on-policy",
        "k3": "a loss term that is never negative",
        "unbiased_k3": "a loss term on stale data",
        "squared_log_ratio": "a pull back to the sampling policy, beside any loss",
        "on_policy_distillation": "a stronger model with the same tokens is at hand",
        "kl_in_reward": "a critic or token-level returns",
        "overlong_penalty": "replies that run into the length limit",
        "ess_rate_scale": "stale data: smaller steps the fewer of its samples count",
        "clipped_value_loss": "several critic updates on the same targets",
    }
)
"""Name -> circumstances; every name of the catalogue is here."""

_WITH_CRITIC = ("critic.kind=model",)
_KL = ("kl.coefficient=0.01",)
_OTHERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gae": ("algorithm.advantage=gae", *_WITH_CRITIC),
        "length_adaptive_lambdas": ("algorithm.advantage=length_adaptive_gae", *_WITH_CRITIC),
        "turn_level_gae": ("algorithm.advantage=turn_level_gae", *_WITH_CRITIC),
        "vtrace": ("algorithm.advantage=vtrace", *_WITH_CRITIC),
        "retrace": ("algorithm.advantage=retrace", *_WITH_CRITIC),
        "reinforce_plus_plus_returns": (*_KL, "kl.placement=reward"),
        "ppo_behavior": ("algorithm.loss=ppo_behavior", "algorithm.allow_uncorrected=true"),
        "token_weights": ("correction.weight=token",),
        "sequence_weights": ("correction.weight=sequence",),
        "geometric_weights": ("correction.weight=geometric",),
        "normalize_weights": ("correction.normalize=true",),
        "finite_mask": (),
        "token_mask": ("correction.token_low=0.5", "correction.token_high=5"),
        "sequence_mask": ("correction.sequence_low=0.1", "correction.sequence_high=10"),
        "geometric_mask": ("correction.geometric_low=0.99", "correction.geometric_high=1.01"),
        "veto_mask": ("correction.veto_below=0.0001",),
        "k2_mask": ("correction.k2_limit=0.1", "correction.k_level=token"),
        "k3_mask": ("correction.k3_limit=0.01", "correction.k_level=sequence_mean"),
        "opsm_mask": ("correction.opsm_delta=0.5",),
        "interpolated_proximal": ("algorithm.proximal=interpolated",),
        "aggregation_weights": ("algorithm.aggregation=token_mean",),
        "k1": (*_KL, "kl.estimator=k1", "kl.placement=reward"),
        "k2": (*_KL, "kl.estimator=k2"),
        "k3": (*_KL, "kl.estimator=k3"),
        "unbiased_k3": (*_KL, "kl.estimator=unbiased_k3"),
        "squared_log_ratio": ("algorithm.squared_log_ratio_coefficient=0.001",),
        "on_policy_distillation": ("distillation.teacher=PATH",),
        "kl_in_reward": (*_KL, "kl.placement=reward"),
        "overlong_penalty": ("algorithm.overlong_buffer_tokens=64",),
        "ess_rate_scale": ("algorithm.scale_rate_by_ess=true",),
        "clipped_value_loss": (*_WITH_CRITIC, "algorithm.advantage=gae"),
    }
)


def configuration(name: str, kind: str) -> tuple[str, ...]:
    """Return the overrides of a configuration with which a run uses a method.

    Args:
        name: of the method.
        kind: of the method, which says where names stand for themselves.

    Raises:
        KeyError: if nothing uses it.
    """
    if name in _OTHERS:
        return _OTHERS[name]
    return ({"advantage": "algorithm.advantage", "loss": "algorithm.loss"}[kind] + f"={name}",)
