"""How long a learner step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """How long a learner step takes.

    Attributes:
        step_s: whatever its tokens.
        step_s_per_token: that each token of the batch adds, prompts included.

    Raises:
        ValueError: if a time is negative or not finite.
    """

    step_s: float = 0.0
    step_s_per_token: float = 0.0

    def __post_init__(self) -> None:
        times = (self.step_s, self.step_s_per_token)
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise ValueError(f"times of a step must be finite and >= 0, got {times}")

    def seconds(self, num_tokens: float) -> float:
        """Return the seconds of a step with so many tokens."""
        return self.step_s + self.step_s_per_token * num_tokens
