"""Notices when the schedulers of a server that runs give no sign of life any more."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from skyrl_async.rollout import engine_process
from skyrl_async.rollout.engine_process import RunningServer

_FIRST = asyncio.FIRST_COMPLETED

_LOOP_LAG_S = 0.5
"""When a probe took this much longer than it may, it was our own loop that did not run."""

Probe = Callable[[RunningServer, float], Awaitable[None]]
"""Asks a server for a sign of life, with a limit in seconds; raises OSError without one."""


class HangWatch:
    """Probes one server after another; both an answer and a growing log are signs of life.

    Args:
        hang_timeout_s: without a sign of life before a server counts as hung.
        probe_interval_s: between an answer and the next question.
        log_path: that the servers write to.
        probe: asks a server; None for a request through its schedulers.
        log_age_s: returns the seconds since the server last wrote something; None for the log's.
        clock: seconds.

    Raises:
        ValueError: if a probe would not fit into the time limit.
    """

    def __init__(
        self,
        *,
        hang_timeout_s: float,
        probe_interval_s: float,
        log_path: Path,
        probe: Probe | None = None,
        log_age_s: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < probe_interval_s < hang_timeout_s:
            raise ValueError(
                f"probe_interval_s must be > 0 and below hang_timeout_s {hang_timeout_s:g}, "
                f"got {probe_interval_s:g}"
            )
        self._hang_timeout_s = hang_timeout_s
        self._probe_interval_s = probe_interval_s
        self._probe = probe or _probe
        self._log_age_s = log_age_s or partial(_age_s, log_path)
        self._clock = clock
        self._silences: dict[object, float] = {}
        self._silence_ended_s = clock()

    @contextlib.contextmanager
    def expect_silence(self, timeout_s: float) -> Iterator[None]:
        """Do not take a blocked scheduler for a hang, for at most ``timeout_s`` seconds."""
        token = object()
        self._silences[token] = self._clock() + timeout_s
        try:
            yield
        finally:
            ended_s = min(self._clock(), self._silences.pop(token))
            self._silence_ended_s = max(self._silence_ended_s, ended_s)

    async def wait_hung(self, server: RunningServer, *, over: set[asyncio.Task[Any]]) -> float:
        """Return how many seconds a server has been silent, as soon as it counts as hung.

        Args:
            server: that answers now.
            over: ends the watch when one of them is done; then 0 is returned.
        """
        heard_s = self._clock()
        while True:
            await asyncio.wait(over, timeout=self._probe_interval_s, return_when=_FIRST)
            if not (_any_done(over) or self._is_silent()):
                heard_s = await self._ask(server, over, heard_s=heard_s)
                # A flooded server answers late, but its scheduler goes on writing its log.
                heard_s = max(heard_s, self._clock() - self._log_age_s())
            if _any_done(over):
                return 0.0
            quiet_s = self._clock() - max(heard_s, self._silence_ended_s)
            if quiet_s >= self._hang_timeout_s and not self._is_silent():
                return quiet_s

    async def _ask(
        self, server: RunningServer, over: set[asyncio.Task[Any]], *, heard_s: float
    ) -> float:
        """Probe once, or until there is no need to; return when it was last known to answer."""
        sent_s = self._clock()
        quiet_s = sent_s - max(heard_s, self._silence_ended_s)
        limit_s = max(self._hang_timeout_s - quiet_s, self._probe_interval_s)
        answer = asyncio.ensure_future(self._probe(server, limit_s))
        try:
            await asyncio.wait({answer, *over}, return_when=_FIRST)
            if not answer.done():
                return heard_s
            with contextlib.suppress(OSError):  # A TimeoutError is one.
                answer.result()
                return self._clock()
        finally:
            answer.cancel()
        now_s = self._clock()
        return now_s if now_s - sent_s > limit_s + _LOOP_LAG_S else heard_s

    def _is_silent(self) -> bool:
        now_s = self._clock()
        for token, until_s in self._silences.items():
            if until_s > now_s:
                return True
            self._silence_ended_s = max(self._silence_ended_s, self._silences[token])
        return False


def _any_done(tasks: set[asyncio.Task[Any]]) -> bool:
    return any(task.done() for task in tasks)


def _age_s(path: Path) -> float:
    """Return the seconds since a file was written; infinity if it is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


async def _probe(server: RunningServer, timeout_s: float) -> None:
    await engine_process.probe(server, timeout_s=timeout_s)
