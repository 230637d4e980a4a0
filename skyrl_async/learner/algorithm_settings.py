"""Which algorithm to train with: every choice in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skyrl_async.algorithms import behavior_losses, sequence_losses
from skyrl_async.algorithms.aggregation import AggregationKind
from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.algorithms.distillation import DistillationSettings
from skyrl_async.algorithms.kl import KlEstimator
from skyrl_async.algorithms.policy_losses import ppo_clip
from skyrl_async.algorithms.tokens import TokenLoss
from skyrl_async.learner.critic import CriticSettings

PolicyLossFunction = Callable[..., TokenLoss]
"""``loss(tokens: LossTokens, **options) -> TokenLoss``."""

MAX_LOG_RATIO = 10.0
"""Of policy to reference, in the estimators of the divergence that exponentiate it."""

VALUE_ESTIMATORS = ("gae", "length_adaptive_gae", "turn_level_gae", "vtrace", "retrace")
"""Advantage estimators that need a critic."""

WEIGHTED_LOSSES: frozenset[PolicyLossFunction] = frozenset(
    {
        behavior_losses.ppo_behavior,
        behavior_losses.reinforce_is,
        behavior_losses.aipo,
        behavior_losses.dppo_tv,
        behavior_losses.dppo_kl,
        behavior_losses.m2po,
        behavior_losses.double_sided,
        behavior_losses.topr_token,
        sequence_losses.topr,
        sequence_losses.vespo,
    }
)
"""Losses whose ratio is to the behavior policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSettings:
    """The penalty for leaving the reference policy.

    Attributes:
        coefficient: 0 for none; then no reference policy is needed.
        estimator: of the divergence from the reference, per token.
        placement: added to the loss, or taken off the rewards.
    """

    coefficient: float = 0.0
    estimator: Literal["auto", KlEstimator] = "auto"
    placement: Literal["loss", "reward"] = "loss"

    @property
    def kind(self) -> KlEstimator:
        """The estimator that ``auto`` stands for: the usual one of each placement."""
        if self.estimator != "auto":
            return self.estimator
        return "k3" if self.placement == "loss" else "k1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmSettings:
    """How advantages, weights, losses and denominators are made.

    Attributes:
        advantage: name of the estimator.
        gamma: discount per token, or per turn.
        gae_lambda: of the estimators with values.
        length_adaptive_alpha: alpha of ``length_adaptive_gae``.
        rho_cap: of ``vtrace``.
        c_cap: of ``vtrace``.
        whiten_advantages: to mean 0 and standard deviation 1 over the kept tokens of a minibatch.
        overlong_buffer_tokens: length of the band below ``max_tokens`` in which the reward falls by
            up to 1; 0 for none.
        max_tokens: of a trajectory, for that band.
        mask_truncated: leave trajectories that a limit ended out of the loss.
        proximal: logprobs of the weights at the start of the step: ``recomputed`` by a forward
            pass, or ``interpolated`` between behavior and current policy (an approximation).
        correction: importance weights and masks.
        loss: the policy loss.
        loss_options: its keyword arguments.
        aggregation: how token losses become one.
        aggregation_length: L of ``constant``.
        entropy_coefficient: of the entropy bonus.
        squared_log_ratio_coefficient: of the squared log ratio to the behavior policy; 0 for none.
        kl: penalty for leaving the reference policy.
        critic: None for no critic.
        scale_rate_by_ess: multiply the learning rate by the root of the effective sample fraction.
        distillation: what a teacher adds to the advantages; None without one.
    """

    advantage: str = "grpo"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    length_adaptive_alpha: float = 0.05
    rho_cap: float = 1.0
    c_cap: float = 1.0
    whiten_advantages: bool = False
    overlong_buffer_tokens: int = 0
    max_tokens: int = 0
    mask_truncated: bool = False
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    loss: PolicyLossFunction = ppo_clip
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    aggregation: AggregationKind = "token_mean"
    aggregation_length: int | None = None
    entropy_coefficient: float = 0.01
    squared_log_ratio_coefficient: float = 0.0
    kl: KlSettings = KlSettings()
    critic: CriticSettings | None = None
    scale_rate_by_ess: bool = False
    distillation: DistillationSettings | None = None

    def __post_init__(self) -> None:
        if self.needs_values and self.critic is None:
            raise ValueError(f"advantage {self.advantage!r} needs a critic, and there is none")
        if self.needs_whole_batch and self.proximal == "interpolated":
            raise ValueError(
                "interpolated proximal logprobs are known only when a token is trained; masks, "
                "values and rewards need them before: set recomputed"
            )

    @property
    def needs_values(self) -> bool:
        """Whether the advantages need a critic."""
        return self.advantage in VALUE_ESTIMATORS

    @property
    def loss_is_weighted(self) -> bool:
        """Whether the loss itself weighs tokens against the policy that sampled them."""
        return self.loss in WEIGHTED_LOSSES

    @property
    def loss_masks_minibatch(self) -> bool:
        """Whether the loss has a mask that depends on all tokens of a minibatch."""
        return self.loss is behavior_losses.m2po

    @property
    def bootstraps(self) -> bool:
        """Whether a sequence that a limit cut off has a value after its last token."""
        return self.critic is not None and self.critic.bootstrap_truncated

    @property
    def needs_gradient_norms(self) -> bool:
        """Whether the advantages need the gradient of every trajectory."""
        return self.advantage == "optimal_off_policy_baseline"

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards depend on the policy's logprobs."""
        return self.kl.coefficient > 0 and self.kl.placement == "reward"

    @property
    def whitens_returns(self) -> bool:
        """Whether the advantages are returns with a penalty at every token, whitened."""
        return self.advantage == "reinforce_plus_plus" and self.kl_in_reward

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over the tokens of a minibatch."""
        return self.whiten_advantages or self.whitens_returns

    @property
    def needs_whole_batch(self) -> bool:
        """Whether logprobs of the whole minibatch come before its first backward pass."""
        return (
            self.needs_values
            or self.correction.needs_whole_batch
            or self.loss_masks_minibatch
            or self.kl_in_reward
            or self.scale_rate_by_ess
            or self.distillation is not None
        )
