"""One question of arithmetic, one answer."""

from __future__ import annotations

import random
from typing import Any

import gymnasium

from skyrl_async.environments.replies import first_integer
from skyrl_async.environments.spaces import UnicodeText

OPERATORS = "+-*"


class Arithmetic(gymnasium.Env[str, str]):
    """Asks "what is 3 + 4 ?"; the first integer of the reply is the answer.

    Operands and result are between 0 and ``max_number``. The reward is 1 for the right result; the
    episode terminates with the reply.

    Args:
        operators: one of them is drawn for each question; any of ``+-*``.
        max_number: the built-in tokenizer has single tokens for 0 to 20.

    Raises:
        ValueError: on an unknown operator, none at all, or ``max_number`` below 1.
    """

    observation_space = UnicodeText(max_length=100)
    action_space = UnicodeText()

    def __init__(self, *, operators: str = "+-", max_number: int = 20) -> None:
        if not operators or not set(operators) <= set(OPERATORS):
            raise ValueError(f"option operators={operators!r} must be some of {OPERATORS!r}")
        if max_number < 1:
            raise ValueError(f"option max_number={max_number} must be >= 1")
        self._operators = operators
        self._max_number = max_number
        self._random: random.Random | None = None
        self._result: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw a question; ``options`` are not read."""
        if seed is not None or self._random is None:
            self._random = random.Random(seed)
        draw = self._random.randint
        operator = self._random.choice(self._operators)
        if operator == "+":
            result = draw(0, self._max_number)
            left = draw(0, result)
            right = result - left
        elif operator == "-":
            left = draw(0, self._max_number)
            right = draw(0, left)
            result = left - right
        else:
            left = draw(1, self._max_number)
            right = draw(0, self._max_number // left)
            result = left * right
        self._result = result
        return f"what is {left} {operator} {right} ?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer.

        Raises:
            RuntimeError: if the episode has ended or not begun.
        """
        if self._result is None:
            raise RuntimeError("no episode is running: call reset first")
        right = first_integer(action) == self._result
        self._result = None
        return ("correct", 1.0, True, False, {}) if right else ("failed", 0.0, True, False, {})
