"""What a pool of engine servers did, as far as a client can see it."""

from __future__ import annotations

import time
from collections.abc import Callable

from skyrl_async.metrics.trace import Lane
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.rollout.sglang_protocol import Reply

_LONGEST_SPAN_S = 1.0
"""A longer one is written in pieces, so that little is lost with a killed process."""


class BusySpans:
    """When one engine of a pool had requests, as spans of the timeline.

    Args:
        lane: of the timeline.
    """

    __slots__ = ("_ended", "_lane", "_since_s")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._since_s: float | None = None
        self._ended = 0

    def request_starts(self) -> None:
        """Call when the engine gets a request."""
        if self._since_s is None:
            self._since_s = time.monotonic()

    def request_ends(self, in_flight: int) -> None:
        """Call when it has answered one, with how many it still has."""
        if self._since_s is None:
            return
        self._ended += 1
        now_s = time.monotonic()
        if in_flight and now_s - self._since_s < _LONGEST_SPAN_S:
            return
        self._lane.span("decode", self._since_s, now_s, {"requests": self._ended})
        self._since_s = now_s if in_flight else None
        self._ended = 0


class PoolMeter:
    """Counts tokens, and charges every second to busy (a request is on an engine) or idle.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = clock()
        self._in_flight = 0
        self._reset()

    def _reset(self) -> None:
        self._finished_requests = 0
        self._generated_tokens = 0
        self._prefilled_tokens = 0
        self._reprefilled_tokens = 0
        self._busy_s = 0.0
        self._idle_s = 0.0

    def _charge(self) -> None:
        now = self._clock()
        if self._in_flight:
            self._busy_s += now - self._mark
        else:
            self._idle_s += now - self._mark
        self._mark = now

    def request_starts(self) -> None:
        """Call when a request goes to an engine."""
        self._charge()
        self._in_flight += 1

    def request_ends(self) -> None:
        """Call when it has come back, whole or not."""
        self._charge()
        self._in_flight -= 1

    def count_reply(self, reply: Reply, *, recomputed_at_swap: bool) -> None:
        """Count what an engine computed for one reply.

        Args:
            reply: whole or not.
            recomputed_at_swap: whether a weight swap made the engine compute prompt and reply anew.
        """
        self._prefilled_tokens += max(0, reply.prompt_tokens - reply.cached_tokens)
        if recomputed_at_swap:
            versions = reply.policy_versions
            boundaries = (i for i in range(1, len(versions)) if versions[i] != versions[i - 1])
            self._reprefilled_tokens += sum(reply.prompt_tokens + i for i in boundaries)

    def request_finishes(self, generated: int) -> None:
        """Count a generation that was returned, with its tokens."""
        self._finished_requests += 1
        self._generated_tokens += generated

    def take(self, *, running: int, waiting: int) -> EngineStats:
        """Return the counters and set them to zero; what a client cannot see stays 0."""
        self._charge()
        stats = EngineStats(
            finished_requests=self._finished_requests,
            generated_tokens=self._generated_tokens,
            prefilled_tokens=self._prefilled_tokens,
            reprefilled_tokens=self._reprefilled_tokens,
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            running=running,
            waiting=waiting,
        )
        self._reset()
        return stats
