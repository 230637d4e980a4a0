"""The section of the configuration for the optimizer, and what rules out what in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from skyrl_async.config_section import Section

_GROUP_KEYS = ("learning_rate_factor", "weight_decay")


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: float = Field(default=2e-3, gt=0)
    """After warm-up; optimizer.schedule says how it goes on."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from the end of warm-up to the last of all optimizer steps."""
    min_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    """Of the learning rate, where a schedule ends."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    no_decay_on_vectors: bool = True
    """Do not decay norm weights and biases."""
    groups: dict[str, Any] = Field(default_factory=dict)
    """By regular expression on names: {lm_head: {learning_rate_factor: 0.1, weight_decay: 0}}."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


def optimizer_problems(optimizer: OptimizerSection) -> Iterator[str]:
    """Yield a line for each set of values that cannot work together."""
    if optimizer.schedule == "constant" and optimizer.min_rate_fraction:
        yield (
            f"optimizer.min_rate_fraction={optimizer.min_rate_fraction}, "
            "optimizer.schedule=constant: a constant rate does not fall; set schedule=cosine or "
            "linear, or min_rate_fraction=0"
        )
    for match, values in optimizer.groups.items():
        problem = _group_problem(match, values)
        if problem:
            yield f"optimizer.groups={match}: {values!r}: {problem}"


def check_schedule(optimizer: OptimizerSection, *, total_steps: int) -> None:
    """Check that something is left of a schedule after warm-up.

    Args:
        optimizer: the section.
        total_steps: optimizer steps of the whole training.

    Raises:
        ValueError: if nothing is.
    """
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= total_steps:
        raise ValueError(
            f"optimizer.schedule={optimizer.schedule}, "
            f"optimizer.warmup_steps={optimizer.warmup_steps}: of {total_steps} optimizer steps in "
            "all none is left after warm-up; lower warmup_steps or set schedule=constant"
        )


def _group_problem(match: str, values: Any) -> str:
    """Return what is wrong with one group, or nothing."""
    try:
        re.compile(match)
    except re.error as error:
        return f"its name is no regular expression ({error})"
    if not isinstance(values, dict) or not values:
        return f"must be a mapping with {' or '.join(_GROUP_KEYS)}"
    for key, value in values.items():
        if key not in _GROUP_KEYS:
            return f"unknown key {key!r}; there are {', '.join(_GROUP_KEYS)}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value >= 0):
            return f"{key} must be a number >= 0"
    return ""
