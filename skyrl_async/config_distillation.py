"""The section of on-policy distillation, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from skyrl_async.config_algorithm import (
    AlgorithmSection,
    CorrectionSection,
    CriticSection,
    FiltersSection,
)
from skyrl_async.config_section import Section

_DEPENDENT = ("coefficient", "reward_weight", "max_log_ratio")


class DistillationSection(Section):
    """Learn from a teacher's logprobs of the policy's own tokens, beside the rewards or alone."""

    teacher: str | None = None
    """Folder or hub name of a causal LM with the policy's tokens; without it, no distillation."""
    coefficient: float = Field(default=1.0, gt=0)
    """Weight of log teacher minus log policy in each token's advantage."""
    reward_weight: float = Field(default=0.0, ge=0)
    """Weight of the advantages from rewards; 0 learns from the teacher alone."""
    max_log_ratio: float | None = Field(default=10.0, gt=0)
    """Limit of that log ratio's magnitude, in nats; null for no limit."""


def distillation_problems(
    distillation: DistillationSection,
    *,
    algorithm: AlgorithmSection,
    correction: CorrectionSection,
    critic: CriticSection,
    filters: FiltersSection,
) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    if distillation.teacher is None:
        for name in _DEPENDENT:
            value = getattr(distillation, name)
            if value != DistillationSection.model_fields[name].default:
                yield (
                    f"distillation.{name}={value}: there is no teacher; set distillation.teacher "
                    f"or remove {name}"
                )
        return
    if algorithm.proximal == "interpolated":
        yield (
            f"algorithm.proximal=interpolated, distillation.teacher={distillation.teacher}: the "
            "teacher is compared with the logprobs at the start of the step; set "
            "algorithm.proximal=recomputed"
        )
    by_sign = {
        "correction.opsm_delta": correction.opsm_delta,
        "correction.m2_limit": correction.m2_limit,
        "algorithm.loss": "m2po" if algorithm.loss == "m2po" else None,
    }
    for name, value in by_sign.items():
        if value is not None:
            yield (
                f"{name}={value}, distillation.teacher={distillation.teacher}: it masks by "
                f"advantages before the teacher has spoken; remove {name}"
            )
    if distillation.reward_weight:
        return
    if critic.kind != "none":
        yield (
            f"critic.kind={critic.kind}, distillation.reward_weight=0: without rewards nothing "
            "uses its values; set distillation.reward_weight above 0 or an algorithm without critic"
        )
    for name in ("zero_variance", "max_pass_rate"):
        value = getattr(filters, name)
        if value:
            yield (
                f"filters.{name}={str(value).lower()}, distillation.reward_weight=0: it would drop "
                "groups for their rewards, which do not count; remove it or set "
                "distillation.reward_weight above 0"
            )
