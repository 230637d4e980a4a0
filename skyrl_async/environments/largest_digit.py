"""Name the largest of a few digits: the quickest task to learn."""

from __future__ import annotations

import random
from typing import Any

import gymnasium

from skyrl_async.environments.replies import first_integer
from skyrl_async.environments.spaces import UnicodeText


class LargestDigit(gymnasium.Env[str, str]):
    """Asks "largest of 3 7 5 ?"; the first integer of the reply is the answer.

    The digits 0 to 9 are drawn independently. The reward is 1 for the largest; the episode
    terminates with the reply.

    Args:
        num_digits: in the question.

    Raises:
        ValueError: if ``num_digits`` is not between 1 and 100.
    """

    observation_space = UnicodeText(max_length=300)
    action_space = UnicodeText()

    def __init__(self, *, num_digits: int = 3) -> None:
        if not 1 <= num_digits <= 100:
            raise ValueError(f"option num_digits={num_digits} must be between 1 and 100")
        self._num_digits = num_digits
        self._random: random.Random | None = None
        self._largest: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw the digits; ``options`` are not read."""
        if seed is not None or self._random is None:
            self._random = random.Random(seed)
        digits = self._random.choices("0123456789", k=self._num_digits)
        self._largest = int(max(digits))
        return f"largest of {' '.join(digits)} ?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer.

        Raises:
            RuntimeError: if the episode has ended or not begun.
        """
        if self._largest is None:
            raise RuntimeError("no episode is running: call reset first")
        right = first_integer(action) == self._largest
        self._largest = None
        return ("correct", 1.0, True, False, {}) if right else ("failed", 0.0, True, False, {})
