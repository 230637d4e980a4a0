"""The sections of the configuration that choose the algorithm, and what rules out what.

The names of losses and estimators are here as text, so that a configuration is checked without
loading torch; a test holds them equal to the functions in ``skyrl_async/algorithms/``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from skyrl_async.config_section import Because, Section, show

Advantage = Literal[
    "grpo",
    "mean_centered",
    "rloo",
    "max_rl",
    "batch_normalized",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "global_baseline",
    "optimal_off_policy_baseline",
    "gae",
    "length_adaptive_gae",
    "turn_level_gae",
    "vtrace",
    "retrace",
]

WeightKind = Literal["none", "token", "sequence", "geometric"]

_ZERO = Because("a limit of 0 would reject nothing")
_HIGH = Because("a higher limit would reject nothing")

LowestRatio = Annotated[float | None, Field(gt=0, le=1), _ZERO]
HighestRatio = Annotated[float | None, Field(ge=1, le=1e4), _HIGH]
LargestDrift = Annotated[float | None, Field(gt=0, le=100), _HIGH]
"""In nats or their square."""

Cap = Annotated[float, Field(gt=0, le=1e30)]
"""Of numbers in float32."""

Coefficient = Annotated[float, Field(ge=0, le=1e6)]

GROUP_ESTIMATORS = (
    *("grpo", "mean_centered", "rloo", "max_rl", "optimal_off_policy_baseline"),
    *("batch_normalized", "reinforce_plus_plus_baseline"),
)
"""Advantage estimators that compare the members of a group, and so need several."""

VALUE_ESTIMATORS = ("gae", "length_adaptive_gae", "turn_level_gae", "vtrace", "retrace")
"""Advantage estimators that need a critic."""

PROXIMAL_LOSSES = (
    *("ppo_clip", "dual_clip", "cispo", "sapo", "reinforce", "kimi_squared_log", "gspo", "gmpo"),
)
"""Their ratio is to the weights at the start of the step; the importance weight is a factor."""

BEHAVIOR_LOSSES = (
    *("ppo_behavior", "reinforce_is", "aipo", "dppo_tv", "dppo_kl", "m2po", "double_sided"),
    *("topr", "topr_token", "vespo"),
)
"""Their ratio is to the weights that sampled the tokens; it is a correction itself."""

UNCORRECTED_LOSSES = ("ppo_behavior",)
"""They clip against the behavior policy, but do not correct for it."""


class AlgorithmSection(Section):
    """Advantages and loss; algorithm=NAME takes a preset, such as grpo or dapo, for all of it."""

    advantage: Advantage = "grpo"
    """Estimator; gae, length_adaptive_gae, turn_level_gae, vtrace and retrace need a critic."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token (per turn in turn_level_gae), with a critic."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of the estimators with a critic."""
    length_adaptive_alpha: float = Field(default=0.05, gt=0)
    """In length_adaptive_gae, lambda is 1 - 1 / (alpha * length)."""
    vtrace_rho_cap: Cap = 1.0
    """Truncation of the importance weight of a temporal difference."""
    vtrace_c_cap: Cap = 1.0
    """Truncation of the importance weight of a trace."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and standard deviation 1 over each minibatch."""
    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """Rewards fall by up to 1 in the last tokens below engine.context_length; 0 for none."""
    mask_truncated: bool = False
    """Leave trajectories that a limit ended out of the loss; their rewards stay in the baseline."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """Logprobs of the start of the step: by a forward pass, or approximately without one."""
    loss: str = "ppo_clip"
    """Policy loss by name, or module:function of your own."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the loss, such as {clip_low: 0.2, clip_high: 0.28}."""
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "constant"] = "token_mean"
    """What counts equally in the loss; constant divides each sequence by aggregation_length."""
    aggregation_length: int | None = Field(default=None, ge=1)
    """Tokens that aggregation=constant divides by."""
    entropy_coefficient: Coefficient = 0.01
    """Weight of the entropy bonus."""
    squared_log_ratio_coefficient: Coefficient = 0.0
    """Weight of each token's squared log ratio to the policy that sampled it; 0.001 is common."""
    scale_rate_by_ess: bool = False
    """Multiply the learning rate by the root of the effective sample fraction of a minibatch."""
    allow_uncorrected: bool = False
    """Train stale tokens without any off-policy correction, for comparison."""


_FROM_ABOVE = (
    *("token_high", "sequence_high", "geometric_high"),
    *("k2_limit", "k3_limit", "m2_limit"),
)
"""Masks that bound ratios from above; a lower limit alone leaves the largest in the loss."""


class CorrectionSection(Section):
    """What is done about tokens that another policy sampled: importance weights and masks."""

    weight: Literal["auto", WeightKind] = "auto"
    """exp(proximal - behavior) per token or sequence; auto: token, none if the loss has its own."""
    weight_cap: float = Field(default=2.0, ge=1, le=1e30)
    """Importance weights are truncated here."""
    normalize: bool = False
    """Divide importance weights by their mean over the minibatch."""
    token_low: LowestRatio = None
    """Tokens with a smaller ratio leave the loss."""
    token_high: HighestRatio = None
    """Tokens with a larger ratio leave the loss."""
    sequence_low: LowestRatio = None
    """Sequences with a smaller product of ratios leave the loss."""
    sequence_high: HighestRatio = None
    """Sequences with a larger product of ratios leave the loss."""
    geometric_low: LowestRatio = None
    """Sequences with a smaller geometric mean of ratios leave the loss."""
    geometric_high: HighestRatio = None
    """Sequences with a larger geometric mean of ratios leave the loss."""
    veto_below: float | None = Field(default=None, gt=0, lt=1)
    """A token with a smaller ratio takes its whole sequence out of the loss."""
    k2_limit: LargestDrift = None
    """Largest half squared log ratio."""
    k3_limit: LargestDrift = None
    """Largest K3 divergence."""
    k_level: Literal["token", "sequence_mean", "sequence_sum", "sequence_max"] = "token"
    """What k2_limit and k3_limit judge."""
    opsm_delta: Annotated[float | None, Field(ge=0, le=100), _HIGH] = None
    """Sequences of negative advantage that drifted by more nats per token leave the loss."""
    m2_limit: LargestDrift = None
    """Largest second moment of the log ratios of a minibatch; the largest leave the loss."""

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the keys that take tokens out of the loss."""
        names = (
            *("token_low", "token_high", "sequence_low", "sequence_high"),
            *("geometric_low", "geometric_high", "veto_below", "k2_limit", "k3_limit"),
            *("opsm_delta", "m2_limit"),
        )
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def bounds_ratios(self) -> bool:
        """Whether a mask rejects what is too far above the policy that sampled it."""
        return any(name in _FROM_ABOVE for name in self.masks)


class KlSection(Section):
    """The penalty for leaving the reference policy, which is the initial one."""

    coefficient: Coefficient = 0.0
    """Weight; 0 for no penalty and no reference policy in memory."""
    estimator: Literal["auto", "k1", "k2", "k3", "unbiased_k3"] = "auto"
    """Of the divergence, per token; auto: k3 in the loss, k1 in the reward."""
    placement: Literal["loss", "reward"] = "loss"
    """Added to the loss of the tokens that no mask rejects, or taken off the rewards of all."""

    @property
    def in_reward(self) -> bool:
        """Whether the rewards are lowered."""
        return self.coefficient > 0 and self.placement == "reward"


class CriticSection(Section):
    """The value function, for the estimators that need one."""

    kind: Literal["none", "head", "model"] = "none"
    """head: a linear layer on the policy's hidden states; model: a decoder of its own."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1e6)
    """Of its own AdamW."""
    updates: int = Field(default=1, ge=1)
    """Critic updates for each update of the policy."""
    clip: float | None = Field(default=0.2, gt=0, le=1e30)
    """Values move at most so far in one step; null for no limit."""
    bootstrap_truncated: bool = False
    """Value what a limit cut off at its last token, instead of counting it as ended."""


class FiltersSection(Section):
    """Groups that are not worth training; others are played in their place."""

    zero_variance: bool = False
    """Drop groups whose members all have the same reward."""
    max_pass_rate: float | None = Field(default=None, gt=0, le=1)
    """Drop groups of which at least this share of members reaches pass_reward."""
    pass_reward: float = 1.0
    """A member with at least this reward has solved the task."""
    max_truncated_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Drop groups of which a larger share of members was truncated."""
    max_rejected_in_a_row: int = Field(default=16, ge=1)
    """After so many, the next group is kept: training goes on when all tasks are solved."""


class GuardSection(Section):
    """What happens when training is about to collapse."""

    enabled: bool = False
    """Watch, and act in order: warn, tighten staleness.max, lower the rate, roll back. A loss or
    gradient that is not finite is always a sign."""
    min_ess_fraction: float = Field(default=0.1, gt=0, lt=1)
    """A smaller effective sample fraction is a sign of collapse."""
    max_kl: float = Field(default=1.0, gt=0)
    """A larger divergence of behavior and proximal policy, in nats per token, is one."""
    max_mismatch_kl: float = Field(default=0.1, gt=0)
    """A larger divergence of engine and learner at the same version is one."""
    max_clip_fraction: float = Field(default=0.5, gt=0, le=1)
    """A larger share of clipped tokens is one."""
    min_entropy: float = Field(default=0.0, ge=0)
    """A smaller entropy, in nats, is one; 0 for no limit."""
    max_reward_drop: float | None = Field(default=0.3, gt=0)
    """A reward so far below the best one is one; null for no limit."""
    patience_steps: int = Field(default=3, ge=1)
    """Steps in a row with a sign before the next action."""
    snapshot_every_steps: int = Field(default=10, ge=1)
    """Healthy steps between the states that a rollback can go back to."""


def algorithm_problems(
    algorithm: AlgorithmSection,
    *,
    group_size: int,
    correction: CorrectionSection,
    kl: KlSection,
    critic: CriticSection,
    filters: FiltersSection,
    max_staleness: int,
    context_length: int,
) -> Iterator[str]:
    """Yield a line for each set of values that cannot work together."""
    yield from _loss_problems(algorithm, correction, max_staleness)
    if group_size < 2 and algorithm.advantage in GROUP_ESTIMATORS:
        yield (
            f"rollout.group_size={group_size}, algorithm.advantage={algorithm.advantage}: it "
            "compares the members of a group; set rollout.group_size to 2 or more, or "
            "algorithm.advantage=global_baseline"
        )
    if group_size < 2 and filters.zero_variance:
        yield (
            f"rollout.group_size={group_size}, filters.zero_variance=true: all rewards of a group "
            f"of one are the same, so {filters.max_rejected_in_a_row} of "
            f"{filters.max_rejected_in_a_row + 1} groups would be thrown away; set "
            "rollout.group_size to 2 or more, or filters.zero_variance=false"
        )
    yield from _critic_problems(algorithm, critic)
    yield from _proximal_problems(algorithm, correction, kl, critic)
    if (algorithm.aggregation == "constant") != (algorithm.aggregation_length is not None):
        yield (
            f"algorithm.aggregation={algorithm.aggregation}, "
            f"algorithm.aggregation_length={show(algorithm.aggregation_length)}: constant, and "
            "only constant, divides by a length; set both or neither"
        )
    if algorithm.overlong_buffer_tokens >= context_length:
        yield (
            f"algorithm.overlong_buffer_tokens={algorithm.overlong_buffer_tokens}: must be below "
            f"engine.context_length={context_length}, where it ends"
        )
    if kl.coefficient and kl.placement == "loss" and kl.estimator == "k1":
        yield (
            "kl.estimator=k1, kl.placement=loss: its gradient has expectation zero; set k2, k3 or "
            "unbiased_k3, or kl.placement=reward"
        )


def weight_kind(algorithm: AlgorithmSection, correction: CorrectionSection) -> WeightKind:
    """Return the kind of importance weight that ``auto`` stands for."""
    if correction.weight != "auto":
        return correction.weight
    return "none" if algorithm.loss in BEHAVIOR_LOSSES else "token"


def _loss_problems(
    algorithm: AlgorithmSection, correction: CorrectionSection, max_staleness: int
) -> Iterator[str]:
    loss, weight = algorithm.loss, weight_kind(algorithm, correction)
    known = (*PROXIMAL_LOSSES, *BEHAVIOR_LOSSES)
    if loss not in known and ":" not in loss:
        close = difflib.get_close_matches(loss.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
        yield (
            f"algorithm.loss={loss}: no such loss; {hint} A loss of your own is given as "
            "module:function"
        )
        return
    if loss in BEHAVIOR_LOSSES and weight != "none":
        yield (
            f"algorithm.loss={loss}, correction.weight={weight}: its ratio is to the behavior "
            "policy already, so the weight would count twice; set correction.weight=none or auto"
        )
    if loss in BEHAVIOR_LOSSES:
        own = loss not in UNCORRECTED_LOSSES
    else:
        # Without another weight, its advantages carry their own.
        own = algorithm.advantage == "vtrace"
    corrected = weight != "none" or correction.bounds_ratios or own
    if not corrected and max_staleness and not algorithm.allow_uncorrected:
        masks = "".join(
            f"correction.{name}={show(getattr(correction, name))}, " for name in correction.masks
        )
        but = "; such a mask alone leaves the largest ratios in the loss" if masks else ""
        yield (
            f"algorithm.loss={loss}, correction.weight={weight}, {masks}"
            f"staleness.max={max_staleness}: stale tokens would be trained without any off-policy "
            f"correction{but}; set correction.weight=auto with a proximal loss such as ppo_clip, a "
            "corrected loss such as m2po, a mask that bounds ratios from above such as "
            "correction.token_high, staleness.max=0, or algorithm.allow_uncorrected=true for a "
            "comparison"
        )
    if algorithm.scale_rate_by_ess and weight == "none":
        yield (
            f"algorithm.scale_rate_by_ess=true, correction.weight={weight}, "
            f"algorithm.loss={loss}: without weights every sample counts in full, and the rate "
            "would never change; set correction.weight=auto with a proximal loss such as "
            "reinforce, or algorithm.scale_rate_by_ess=false"
        )


def _critic_problems(algorithm: AlgorithmSection, critic: CriticSection) -> Iterator[str]:
    needed = algorithm.advantage in VALUE_ESTIMATORS
    if needed and critic.kind == "none":
        yield (
            f"algorithm.advantage={algorithm.advantage}, critic.kind=none: it needs values; set "
            "critic.kind=model or head"
        )
    if algorithm.advantage == "vtrace" and algorithm.vtrace_c_cap > algorithm.vtrace_rho_cap:
        yield (
            f"algorithm.vtrace_c_cap={algorithm.vtrace_c_cap}, "
            f"algorithm.vtrace_rho_cap={algorithm.vtrace_rho_cap}: traces must not be truncated "
            "later than differences; lower the first or raise the second"
        )
    if not needed and critic.kind != "none":
        yield (
            f"critic.kind={critic.kind}, algorithm.advantage={algorithm.advantage}: no estimator "
            f"uses the values; set one of {', '.join(VALUE_ESTIMATORS)}, or critic.kind=none"
        )


def _proximal_problems(
    algorithm: AlgorithmSection,
    correction: CorrectionSection,
    kl: KlSection,
    critic: CriticSection,
) -> Iterator[str]:
    if algorithm.proximal != "interpolated":
        return
    before = [f"correction.{name}={getattr(correction, name)}" for name in correction.masks]
    if correction.normalize:
        before.append("correction.normalize=true")
    if critic.kind != "none":
        before.append(f"critic.kind={critic.kind}")
    if kl.in_reward:
        before.append("kl.placement=reward")
    if algorithm.scale_rate_by_ess:
        before.append("algorithm.scale_rate_by_ess=true")
    if algorithm.loss == "m2po":
        before.append("algorithm.loss=m2po")
    if before:
        yield (
            f"algorithm.proximal=interpolated, {', '.join(before)}: these need proximal logprobs "
            "before the first backward pass; set algorithm.proximal=recomputed"
        )


ADVANTAGES: tuple[str, ...] = get_args(Advantage)
"""All estimators."""
