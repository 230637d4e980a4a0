"""A simulated engine: an ``EngineClient`` that takes given times instead of computing.

Tokens are one and the same id and a stop token; their number is drawn, their policy versions are
those that an engine of this speed would have had. Requests are answered when they would have been.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from skyrl_async.distribution import Distribution
from skyrl_async.metrics.trace import NULL_LANE, Lane
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.simulate.virtual_engine import (
    EngineTimes,
    EngineTotals,
    Finished,
    Segments,
    VirtualEngine,
)
from skyrl_async.types import FinishReason, Float32Array, Generation, Int32Array, Sampling

if TYPE_CHECKING:
    from torch import Tensor

_SPAN_S = 0.25
_LOGPROB = -1.0
_LENGTHS_AT_ONCE = 1024
_REPLIES_KEPT = 256

_Waiter = tuple["asyncio.Future[Generation]", Sampling, FinishReason]
"""Future, sampling and reason of a request."""


class SimulatedEngine:
    """Continuous batching at a given speed, on the event loop's clock.

    A conversation's context is computed once: a session's later turns cost their new tokens only,
    unless a swap has come between, where keys and values are recomputed.

    Args:
        times: how fast it is.
        reply_tokens: of one reply, stop token included; cut at the request's limits.
        context_length: tokens of one request, prompt and reply together.
        seed: of the lengths.
        policy_version: that it has at the start.
        lane: of the timeline.
    """

    def __init__(
        self,
        times: EngineTimes,
        *,
        reply_tokens: Distribution,
        context_length: int,
        seed: int = 0,
        policy_version: int = 0,
        lane: Lane = NULL_LANE,
    ) -> None:
        self._times = times
        self._reply_tokens = reply_tokens
        self._context_length = context_length
        self._rng = np.random.default_rng(seed)
        self._lengths: list[int] = []
        self._reply_arrays = lru_cache(maxsize=_REPLIES_KEPT)(_reply_arrays)
        self._engine = VirtualEngine(times, policy_version=policy_version, time_s=time.monotonic())
        self._waiters: dict[str, _Waiter] = {}
        self._sessions: dict[str, tuple[int, int]] = {}  # computed tokens, under which version
        self._timer: asyncio.TimerHandle | None = None
        self._state: Literal["ready", "running", "stopped"] = "ready"
        self._spans = _Spans(lane)
        self._lane = lane
        self._totals = EngineTotals()

    @property
    def policy_version(self) -> int:
        """Version of the weights that compute the next token."""
        return self._engine.policy_version

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str | None = None,
    ) -> Generation:
        """Answer after as long as it would take; see :meth:`EngineClient.generate`."""
        context = len(token_ids)
        self._check(context, request_id)
        count, reason = self._length(sampling, room=self._context_length - context)
        known = 0 if session_id is None else self._known(session_id)
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiters[request_id] = (future, sampling, reason)
        self._settle(
            self._engine.submit(
                request_id,
                num_tokens=count,
                context_tokens=context,
                new_tokens=max(0, context - known),
                time_s=time.monotonic(),
            )
        )
        try:
            generation = await future
        finally:
            if self._waiters.pop(request_id, None) is not None:
                self._withdraw(request_id)
        if session_id is not None:
            done = context + len(generation.token_ids)
            self._sessions[session_id] = (done, self.policy_version)
        return generation

    def abort(self, request_id: str) -> None:
        """End a request; its waiter gets the tokens sampled so far. Unknown ids are ignored."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is None:
            return
        taken = self._withdraw(request_id)
        if taken is not None:
            future, sampling, _ = waiter
            if not future.done():
                future.set_result(self._generation(taken, sampling, FinishReason.ABORT))

    def release(self, session_id: str) -> None:
        """Forget what was computed for a session."""
        self._sessions.pop(session_id, None)

    async def pause(self) -> None:
        """Stop after the current decode step and keep all requests."""
        self._settle(self._engine.pause(time_s=time.monotonic()))

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._engine.resume(time_s=time.monotonic())
        self._settle(())

    async def load_weights(self, weights: Mapping[str, Tensor], *, policy_version: int) -> None:
        """Take over a version; see :meth:`EngineClient.load_weights`. The weights are not read."""
        now = time.monotonic()
        self._settle(self._engine.swap(policy_version, time_s=now))
        self._spans.end(now)
        stall_s = self._times.swap_stall_s
        self._lane.span("swap", now, now + stall_s, {"policy_version": policy_version})
        self._lane.flow("loaded", policy_version=policy_version, time_s=now)
        if stall_s:
            await asyncio.sleep(stall_s)

    def take_stats(self) -> EngineStats:
        """Return what happened since the previous call."""
        self._settle(self._engine.advance(time.monotonic()))
        self._collect()
        totals, self._totals = self._totals, EngineTotals()
        return EngineStats(
            decode_steps=round(totals.decode_steps),
            finished_requests=totals.finished,
            generated_tokens=round(totals.generated_tokens),
            prefilled_tokens=totals.prefilled_tokens,
            reprefilled_tokens=round(totals.reprefilled_tokens),
            num_swaps=totals.num_swaps,
            swap_stall_s=totals.swap_s,
            busy_s=totals.decode_s + totals.prefill_s + totals.swap_s,
            idle_s=totals.idle_s,
            running=self._engine.num_running,
            waiting=self._engine.num_waiting,
        )

    async def run(self) -> None:
        """Serve requests until cancelled.

        Raises:
            RuntimeError: if it runs already or has stopped.
        """
        if self._state != "ready":
            raise RuntimeError(f"the engine is {self._state}; run() can be called once")
        self._state = "running"
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._state = "stopped"
            if self._timer is not None:
                self._timer.cancel()
            for future, *_ in self._waiters.values():
                if not future.done():
                    future.set_exception(RuntimeError("the engine stopped before the request"))
            self._waiters.clear()

    def _check(self, context: int, request_id: str) -> None:
        if self._state == "stopped":
            raise RuntimeError("the engine has stopped and takes no requests")
        if not 0 < context < self._context_length:
            raise ValueError(
                f"token_ids has {context} tokens; it needs 1 to {self._context_length - 1}, below "
                f"the context_length of {self._context_length}"
            )
        if request_id in self._waiters:
            raise ValueError(f"request_id {request_id!r} is in use by a live request")

    def _length(self, sampling: Sampling, *, room: int) -> tuple[int, FinishReason]:
        if not self._lengths:
            drawn = self._reply_tokens.draw(self._rng, _LENGTHS_AT_ONCE)
            self._lengths = np.maximum(1, np.rint(drawn)).astype(int).tolist()
        wanted, most = self._lengths.pop(), min(sampling.max_tokens, room)
        if wanted > most:
            return most, FinishReason.LENGTH
        return wanted, FinishReason.STOP

    def _known(self, session_id: str) -> int:
        """Return how many tokens of a conversation need not be computed."""
        tokens, version = self._sessions.get(session_id, (0, 0))
        stale = self._times.recomputes_kv and version != self.policy_version
        return 0 if stale else tokens

    def _withdraw(self, request_id: str) -> Finished | None:
        done, taken = self._engine.cancel(request_id, time_s=time.monotonic())
        self._settle(done)
        return taken

    def _settle(self, done: Iterable[Finished]) -> None:
        """Answer what is done, and wake up for what is done next."""
        for finished in done:
            waiter = self._waiters.pop(str(finished.key), None)
            if waiter is None:
                continue
            future, sampling, reason = waiter
            if not future.done():
                future.set_result(self._generation(finished, sampling, reason))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (next_s := self._engine.next_finish_s()) is not None:
            self._timer = _call_at(next_s, self._on_timer)

    def _generation(
        self, finished: Finished, sampling: Sampling, reason: FinishReason
    ) -> Generation:
        """Return the tokens: all the same but for the stop token at the end."""
        versions = _versions(finished.segments)
        ids, logprobs = self._reply_arrays(
            len(versions), sampling.stop_token_ids, reason is FinishReason.STOP
        )
        return Generation(
            token_ids=ids,
            logprobs=logprobs,
            policy_versions=versions,
            temperature=sampling.temperature or 1.0,
            finish_reason=reason,
        )

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._settle(self._engine.advance(now))
        if now - self._spans.since_s >= _SPAN_S:
            self._collect()
            self._spans.end(now)

    def _collect(self) -> None:
        totals = self._engine.take_totals()
        self._spans.add(totals)
        _add(self._totals, totals)


def _call_at(time_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
    loop = asyncio.get_running_loop()
    return loop.call_later(max(0.0, time_s - time.monotonic()), callback)


def _add(total: EngineTotals, other: EngineTotals) -> None:
    for name in EngineTotals.__dataclass_fields__:
        setattr(total, name, getattr(total, name) + getattr(other, name))


def _reply_arrays(
    length: int, stop_token_ids: tuple[int, ...], stopped: bool
) -> tuple[Int32Array, Float32Array]:
    """Return token ids and logprobs ``[length]``, read-only, so that replies can share them."""
    filler = next(token for token in range(len(stop_token_ids) + 1) if token not in stop_token_ids)
    ids = np.full(length, filler, np.int32)
    if stopped and length and stop_token_ids:
        ids[-1] = stop_token_ids[0]
    logprobs = np.full(length, _LOGPROB, np.float32)
    for array in (ids, logprobs):
        array.setflags(write=False)
    return ids, logprobs


def _versions(segments: Segments) -> Int32Array:
    """Return the version of each token, read-only."""
    versions = np.empty(sum(count for _, count in segments), np.int32)
    start = 0
    for version, count in segments:
        versions[start : start + count] = version
        start += count
    versions.setflags(write=False)
    return versions


class _Spans:
    """Decoding on the timeline, a few spans a second."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self.since_s = time.monotonic()
        self._sum = EngineTotals()

    def add(self, totals: EngineTotals) -> None:
        """Add what the engine did."""
        _add(self._sum, totals)

    def end(self, now_s: float) -> None:
        """Write what was added, as if done without a break before now."""
        done, self._sum, self.since_s = self._sum, EngineTotals(), now_s
        if done.decode_steps < 1:
            return
        args = {
            "steps": round(done.decode_steps),
            "tokens": round(done.generated_tokens),
            "prefilled": done.prefilled_tokens,
        }
        self._lane.span("decode", now_s - done.decode_s - done.prefill_s, now_s, args)
