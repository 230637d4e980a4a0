"""Every decode step of an embedded engine, and what its time was made of.

On Linux's account, the time of a thread has three parts: it runs, is preempted (ready while other
programs have its core), or is blocked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from skyrl_async.rollout.embedded_engine import EmbeddedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One decode step.

    Attributes:
        gap_s: since the previous step ended.
        running_s: of them, on a core.
        preempted_s: of them, ready but not on a core; 0 if the kernel does not count it.
        tokens: sampled.
        swaps: weights exchanged since the previous step ended.
        swap_s: seconds of them; under ``recompute`` also of a step that recomputed contexts.
    """

    gap_s: float
    running_s: float
    preempted_s: float
    tokens: int
    swaps: int
    swap_s: float

    @property
    def own_s(self) -> float:
        """Seconds without preemption."""
        return self.gap_s - self.preempted_s


class StepLog:
    """Writes down every decode step of an engine, from a coroutine beside it."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine
        self._steps: list[Step] = []

    async def run(self) -> None:
        """Look once in every round of the event loop, which has at most one decode step."""
        swaps, swap_s, before = 0, 0.0, read_clocks()
        while True:
            await asyncio.sleep(0)
            stats = self._engine.take_stats()
            swaps += stats.num_swaps
            swap_s += stats.swap_stall_s
            if not stats.decode_steps:
                continue
            now = read_clocks()
            self._steps.append(
                Step(
                    gap_s=now[0] - before[0],
                    running_s=now[1] - before[1],
                    preempted_s=now[2] - before[2],
                    tokens=stats.generated_tokens,
                    swaps=swaps,
                    swap_s=swap_s,
                )
            )
            swaps, swap_s, before = 0, 0.0, now

    def take(self) -> list[Step]:
        """Return the steps since the previous call."""
        steps, self._steps = self._steps, []
        return steps


def read_clocks() -> tuple[float, float, float]:
    """Return the time, and how long this thread has run, and has been ready without a core."""
    try:
        ready_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except FileNotFoundError:
        ready_ns = 0
    return time.perf_counter(), time.thread_time(), ready_ns / 1e9


def time_parts(steps: Sequence[Step]) -> dict[str, float]:
    """Return milliseconds of the mean decode step by part."""
    own, running, whole = (total(steps, part) for part in ("own_s", "running_s", "gap_s"))
    parts = {"running_ms": running, "preempted_ms": whole - own, "blocked_ms": own - running}
    return {name: 1e3 * seconds / len(steps) for name, seconds in parts.items()}


def total(steps: Sequence[Step], attribute: str) -> float:
    return sum(map(attrgetter(attribute), steps))
