"""The section of on-policy distillation, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from skyrl_async.config_algorithm import (
    AlgorithmSection,
    Coefficient,
    CorrectionSection,
    CriticSection,
    FiltersSection,
    KlSection,
)
from skyrl_async.config_section import Section, show, unread

_DEPENDENT = ("coefficient", "reward_weight", "max_log_ratio")


class DistillationSection(Section):
    """Learn from a teacher's logprobs of the policy's own tokens, beside the rewards or alone."""

    teacher: str | None = None
    """Folder or hub name of a causal LM with the policy's tokens; without it, no distillation."""
    coefficient: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of log teacher minus log policy in each token's advantage."""
    reward_weight: Coefficient = 0.0
    """Weight of the advantages from rewards; 0 learns from the teacher alone."""
    max_log_ratio: float | None = Field(default=10.0, gt=0, le=1e30)
    """Limit of that log ratio's magnitude, in nats; null for no limit."""


def distillation_problems(
    distillation: DistillationSection,
    *,
    algorithm: AlgorithmSection,
    correction: CorrectionSection,
    kl: KlSection,
    critic: CriticSection,
    filters: FiltersSection,
) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    if distillation.teacher is None:
        why = ": there is no teacher; set distillation.teacher"
        yield from unread("distillation", distillation, _DEPENDENT, why=why)
        return
    if algorithm.proximal == "interpolated":
        yield (
            f"algorithm.proximal=interpolated, distillation.teacher={distillation.teacher}: the "
            "teacher is compared with the logprobs at the start of the step; set "
            "algorithm.proximal=recomputed"
        )
    early = (
        f"distillation.teacher={distillation.teacher}: it masks by advantages before the teacher "
        "has spoken"
    )
    for name in ("opsm_delta", "m2_limit"):
        value = getattr(correction, name)
        if value is not None:
            yield f"correction.{name}={show(value)}, {early}; remove correction.{name}"
    if algorithm.loss == "m2po":
        yield f"algorithm.loss=m2po, {early}; set another loss, such as reinforce_is"
    if not distillation.reward_weight:
        yield from _needs_rewards(critic, filters)
        yield from _reward_shaping(algorithm, kl)


def _needs_rewards(critic: CriticSection, filters: FiltersSection) -> Iterator[str]:
    """Yield a line for each part that has nothing to do without rewards."""
    if critic.kind != "none":
        yield (
            f"critic.kind={critic.kind}, distillation.reward_weight=0: without rewards nothing "
            "uses its values; set distillation.reward_weight above 0 or an algorithm without critic"
        )
    for name in ("zero_variance", "max_pass_rate"):
        value = getattr(filters, name)
        if value:
            yield (
                f"filters.{name}={show(value)}, distillation.reward_weight=0: it would drop "
                "groups for their rewards, which do not count; remove it or set "
                "distillation.reward_weight above 0"
            )


def _reward_shaping(algorithm: AlgorithmSection, kl: KlSection) -> Iterator[str]:
    """Yield a line for each key that changes only advantages from rewards, which count nothing."""
    no_rewards = "distillation.reward_weight=0"
    remedy = "distillation.reward_weight above 0"
    if kl.in_reward:
        yield (
            f"kl.placement=reward, kl.coefficient={show(kl.coefficient)}, {no_rewards}: the "
            "penalty would be taken off rewards, which do not count; set kl.placement=loss or "
            f"{remedy}"
        )
    if algorithm.overlong_buffer_tokens:
        yield (
            f"algorithm.overlong_buffer_tokens={algorithm.overlong_buffer_tokens}, {no_rewards}: "
            f"it lowers rewards, which do not count; set 0 or {remedy}"
        )
    if algorithm.whiten_advantages:
        yield (
            f"algorithm.whiten_advantages=true, {no_rewards}: it scales the advantages from "
            f"rewards, which do not count; set false or {remedy}"
        )
    if algorithm.advantage == "optimal_off_policy_baseline":
        yield (
            f"algorithm.advantage={algorithm.advantage}, {no_rewards}: it pays for the gradient of "
            "every trajectory to compare rewards, which do not count; set "
            f"algorithm.advantage=mean_centered or {remedy}"
        )
