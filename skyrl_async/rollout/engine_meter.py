"""Counters and a ledger of wall time for one engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from skyrl_async.metrics.trace import NULL_LANE, Lane
from skyrl_async.rollout.engine_client import EngineStats

_LONGEST_STRETCH_S = 1.0
"""A longer stretch of decoding is several spans, so that little is lost with a killed process."""


class EngineMeter:
    """Charges every second since the previous snapshot to one of busy, yielded and idle."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, lane: Lane = NULL_LANE
    ) -> None:
        """Start counting, idle.

        Args:
            clock: seconds; that of the lane, if there is one.
            lane: of the timeline.
        """
        self._clock = clock
        self._lane = lane
        self._stretch = _Stretch(lane)
        self._paused_s: float | None = None
        self._mark = clock()
        self._idle = True
        self._last_step_end: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._decode_steps = 0
        self._finished_requests = 0
        self._generated_tokens = 0
        self._prefilled_tokens = 0
        self._reprefilled_tokens = 0
        self._num_swaps = 0
        self._swap_stall_s = 0.0
        self._gaps = 0
        self._gaps_s = 0.0
        self._longest_gap_s = 0.0
        self._busy_s = 0.0
        self._yielded_s = 0.0
        self._idle_s = 0.0

    def _charge_away(self) -> None:
        now = self._clock()
        if self._idle:
            self._idle_s += now - self._mark
        else:
            self._yielded_s += now - self._mark
        self._mark = now

    def becomes_idle(self, *, paused: bool = False) -> None:
        """Call when there is nothing to compute, or nothing must be computed."""
        self._charge_away()
        self._idle = True
        self._stretch.end()
        self._paused_s = self._mark if paused else None

    def wakes(self) -> None:
        """Call when there is work again."""
        self._charge_away()
        self._idle = False
        if self._paused_s is not None:
            self._lane.span("paused", self._paused_s, self._mark)
            self._paused_s = None

    def request_ends(self) -> None:
        """Call when a request returned a generation."""
        self._finished_requests += 1

    def work_starts(self) -> None:
        """Call at the start of a decode step or a swap."""
        self._charge_away()

    def _charge_busy(self) -> float:
        now = self._clock()
        seconds = now - self._mark
        self._busy_s += seconds
        self._mark = now
        return seconds

    def step_ends(self, *, generated: int, prefilled: int, reprefilled: int, running: bool) -> None:
        """Call after a decode step.

        Args:
            generated: tokens sampled.
            prefilled: context tokens computed.
            reprefilled: context tokens computed again because of a swap.
            running: whether requests go on, so that the time to the next step is a gap for them.
        """
        seconds = self._charge_busy()
        self._decode_steps += 1
        self._generated_tokens += generated
        self._prefilled_tokens += prefilled
        self._reprefilled_tokens += reprefilled
        started_s = self._mark - seconds
        if reprefilled:
            self._swap_stall_s += seconds
            self._stretch.end()
            self._lane.span("recompute", started_s, self._mark, {"tokens": reprefilled})
        else:
            self._stretch.add(started_s, self._mark, generated=generated, prefilled=prefilled)
        if self._last_step_end is not None:
            gap_s = self._mark - self._last_step_end
            self._gaps += 1
            self._gaps_s += gap_s
            self._longest_gap_s = max(self._longest_gap_s, gap_s)
        self._last_step_end = self._mark if running else None

    def swap_ends(self, policy_version: int) -> None:
        """Call after a weight swap, with the version that the engine has now."""
        seconds = self._charge_busy()
        self._swap_stall_s += seconds
        self._num_swaps += 1
        self._stretch.end()
        started_s = self._mark - seconds
        self._lane.span("swap", started_s, self._mark, {"policy_version": policy_version})
        self._lane.flow("loaded", policy_version=policy_version, time_s=self._mark)

    def take(self, *, running: int, waiting: int) -> EngineStats:
        """Return the counters and set them to zero."""
        self._charge_away()
        mean_gap_s = self._gaps_s / self._gaps if self._gaps else math.inf
        stats = EngineStats(
            decode_steps=self._decode_steps,
            finished_requests=self._finished_requests,
            generated_tokens=self._generated_tokens,
            prefilled_tokens=self._prefilled_tokens,
            reprefilled_tokens=self._reprefilled_tokens,
            num_swaps=self._num_swaps,
            swap_stall_s=self._swap_stall_s,
            longest_gap_s=self._longest_gap_s,
            longest_gap_decode_steps=self._longest_gap_s / mean_gap_s,
            busy_s=self._busy_s,
            yielded_s=self._yielded_s,
            idle_s=self._idle_s,
            running=running,
            waiting=waiting,
        )
        self._reset()
        return stats


class _Stretch:
    """Decode steps without interruption, which are one span of the timeline."""

    __slots__ = ("_end_s", "_generated", "_lane", "_prefilled", "_start_s", "_steps")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._start_s = self._end_s = 0.0
        self._steps = self._generated = self._prefilled = 0

    def add(self, start_s: float, end_s: float, *, generated: int, prefilled: int) -> None:
        """Add a step; the first one begins the stretch."""
        if not self._steps:
            self._start_s = start_s
        self._end_s = end_s
        self._steps += 1
        self._generated += generated
        self._prefilled += prefilled
        if end_s - self._start_s >= _LONGEST_STRETCH_S:
            self.end()

    def end(self) -> None:
        """Write the stretch, if there is one."""
        if not self._steps:
            return
        args = {"steps": self._steps, "tokens": self._generated, "prefilled": self._prefilled}
        self._lane.span("decode", self._start_s, self._end_s, args)
        self._steps = self._generated = self._prefilled = 0
