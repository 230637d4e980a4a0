"""Guess a number from the answers "higher" and "lower": the smallest task that needs memory."""

from __future__ import annotations

import random
from typing import Any

import gymnasium

from skyrl_async.environments.replies import first_integer
from skyrl_async.environments.spaces import UnicodeText


class NumberGuess(gymnasium.Env[str, str]):
    """A number is drawn; the policy has ``max_guesses`` replies to name it.

    The first integer of a reply is the guess; "higher" means that the number is higher than it. A
    reply without an integer, or with one out of range, is answered "invalid" and costs a guess. The
    reward is 1 when the number is named, and the episode terminates then or with the last guess.

    ``max_guesses`` of at least ``log2(high - low + 2)``, rounded up, lets binary search always win:
    so the default can be solved fully with 4; 1 to 15 with 4 guesses leaves no guess to waste.

    Args:
        low: smallest number.
        high: largest number; the built-in tokenizer has single tokens for 0 to 20.
        max_guesses: replies.

    Raises:
        ValueError: if the range is empty or there are no guesses.
    """

    observation_space = UnicodeText(max_length=100)
    action_space = UnicodeText()

    def __init__(self, *, low: int = 1, high: int = 10, max_guesses: int = 6) -> None:
        if low > high:
            raise ValueError(f"option low={low} must not be above option high={high}")
        if max_guesses < 1:
            raise ValueError(f"option max_guesses={max_guesses} must be >= 1")
        self._low = low
        self._high = high
        self._max_guesses = max_guesses
        self._random: random.Random | None = None
        self._number = low
        self._guesses_left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw the number; ``options`` are not read."""
        if seed is not None or self._random is None:
            self._random = random.Random(seed)
        self._number = self._random.randint(self._low, self._high)
        self._guesses_left = self._max_guesses
        return f"guess {self._low} to {self._high}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer one guess.

        Raises:
            RuntimeError: if the episode has ended or not begun.
        """
        if self._guesses_left < 1:
            raise RuntimeError("no episode is running: call reset first")
        self._guesses_left -= 1
        guess = first_integer(action)
        if guess == self._number:
            self._guesses_left = 0
            return "correct", 1.0, True, False, {}
        if guess is None or not self._low <= guess <= self._high:
            answer = "invalid"
        else:
            answer = "higher" if guess < self._number else "lower"
        return answer, 0.0, self._guesses_left == 0, False, {}
