"""Environments of the benchmarks, as ``environment.name=benchmarks.environments:SlowGuess``."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any


class SlowGuess:
    """Guess a number within three turns, with a tool that takes its time.

    Every step waits for a lognormal latency, as a tool or a sandbox would. An episode always has
    three turns: the reward, given with the last one, is 1 if any reply named the number.

    Args:
        high: largest number.
        latency_mean_s: mean of one latency, in seconds.
        latency_sigma: of the logarithm of the latency.
    """

    def __init__(
        self, *, high: int = 4, latency_mean_s: float = 0.05, latency_sigma: float = 1.0
    ) -> None:
        self._high = high
        self._mu = math.log(latency_mean_s) - latency_sigma**2 / 2
        self._sigma = latency_sigma

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw the number."""
        self._number = random.Random(seed).randint(1, self._high)
        # Members of a group share the seed of the task, but not how long their tools take.
        self._latency = random.Random()
        self._turns_left = 3
        self._found = False
        return f"guess 1 to {self._high}", {}

    async def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer a guess after a while."""
        await asyncio.sleep(self._latency.lognormvariate(self._mu, self._sigma))
        self._turns_left -= 1
        word = action.strip()
        guess = int(word) if word.isdecimal() else 0
        last = self._turns_left == 0
        self._found |= guess == self._number
        if not 1 <= guess <= self._high:
            answer = "invalid"
        elif guess == self._number:
            answer = "correct"
        else:
            answer = "higher" if guess < self._number else "lower"
        return answer, float(last and self._found), last, False, {}
