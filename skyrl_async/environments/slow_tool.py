"""An environment that only takes time, to try how a run's shape copes with slow tools."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np

from skyrl_async.distribution import parse_distribution


class SlowTool:
    """Answers every reply after a while, for a given number of turns; the reward is a coin toss.

    ::

        environment.name=skyrl_async.environments.slow_tool:SlowTool
        environment.options.latency_s=lognormal:0.05,1.0
        environment.options.turns=uniform:2,5

    Args:
        latency_s: seconds of one answer; see :mod:`skyrl_async.distribution`.
        turns: replies of an episode, rounded, at least 1.

    Raises:
        ValueError: if a distribution has another form.
    """

    def __init__(self, *, latency_s: str = "fixed:0", turns: str = "fixed:3") -> None:
        self._latency_s = parse_distribution(latency_s)
        self._turns = parse_distribution(turns)

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw the number of turns and how long each answer takes."""
        # Members of a group share the seed of the task, but not how long their tools take.
        rng = np.random.default_rng(random.getrandbits(64))
        count = max(1, round(float(self._turns.draw(rng, 1)[0])))
        self._latencies = self._latency_s.draw(rng, count).tolist()
        self._reward = float(rng.integers(2))
        return "go", {}

    async def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer after a while."""
        if (seconds := self._latencies.pop()) > 0:
            await asyncio.sleep(seconds)
        last = not self._latencies
        return "again", self._reward if last else 0.0, last, False, {}
