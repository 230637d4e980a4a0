"""A live request of the embedded engine, and the choice of what one forward pass computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyrl_async.types import FinishReason, Generation, Sampling


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One live request.

    Attributes:
        request_id: unique among live requests.
        session_id: whose next turn may use its keys and values; None if there is none, or the
            session was released.
        sampling: how to sample.
        stop_token_ids: of ``sampling``.
        token_ids: the context, which grows by every sampled token.
        prompt_length: leading tokens that were given.
        max_length: length at which it ends.
        future: of its waiter.
        slot: -1 until it has one.
        kv_length: leading tokens whose keys and values are in the slot.
        stale_length: leading tokens that were computed before the last weight swap.
        logprobs: of the sampled tokens.
        policy_versions: of the sampled tokens.
        queued_at_s: when it came, if the engine had no place for it; ``time.monotonic()``.
        queued_s: that it waited for its place.
    """

    request_id: str
    session_id: str | None
    sampling: Sampling
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    prompt_length: int
    max_length: int
    future: asyncio.Future[Generation]
    slot: int = -1
    kv_length: int = 0
    stale_length: int = 0
    logprobs: list[float] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)
    queued_at_s: float | None = None
    queued_s: float = 0.0

    def leaves_queue(self) -> None:
        """Note how long it waited, if the engine was full."""
        if self.queued_at_s is not None:
            self.queued_s = time.monotonic() - self.queued_at_s

    def append(self, token_id: int, logprob: float, policy_version: int) -> FinishReason | None:
        """Add a sampled token; return why the request ends with it, or None."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.policy_versions.append(policy_version)
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_length else None

    def generation(self, reason: FinishReason) -> Generation:
        """Return what was sampled so far."""
        return Generation(
            token_ids=_read_only(self.token_ids[self.prompt_length :], np.int32),
            logprobs=_read_only(self.logprobs, np.float32),
            policy_versions=_read_only(self.policy_versions, np.int32),
            temperature=self.sampling.temperature or 1.0,
            finish_reason=reason,
            queued_s=self.queued_s,
        )

    def fail(self, error: Exception) -> None:
        """Raise ``error`` at the waiter."""
        if not self.future.done():
            self.future.set_exception(error)


def _read_only(values: Sequence[float], dtype: type[np.generic]) -> NDArray[Any]:
    """Return an array that a record takes over without copying it."""
    array = np.array(values, dtype)
    array.setflags(write=False)
    return array


@dataclass(slots=True, kw_only=True)
class Batch:
    """What one forward pass computes.

    Attributes:
        requests: whose tokens are in it; the first ``num_decoding`` have one token each.
        counts: tokens of each request, ascending.
        num_decoding: requests that only get their last sampled token computed.
        copies: requests whose whole context equals that of the request with the given index, so
            that its keys, values and logits serve both.
    """

    requests: list[Request]
    counts: list[int]
    num_decoding: int
    copies: list[tuple[Request, int]]

    @property
    def new_token_ids(self) -> list[int]:
        """The packed tokens, in order of the requests."""
        decoding = self.num_decoding
        ids = [request.token_ids[-1] for request in self.requests[:decoding]]
        for request, count in zip(self.requests[decoding:], self.counts[decoding:], strict=True):
            ids += request.token_ids[request.kv_length : request.kv_length + count]
        return ids

    def count_prefill(self) -> tuple[int, int]:
        """Return context tokens computed for the first time, and again because of a swap."""
        prefilled = reprefilled = 0
        decoding = self.num_decoding
        for request, count in zip(self.requests[decoding:], self.counts[decoding:], strict=True):
            start, end = request.kv_length, request.kv_length + count
            stale = min(max(start, request.stale_length), end)
            reprefilled += stale - start
            prefilled += max(0, min(end, request.prompt_length) - stale)
        return prefilled, reprefilled

    def advance(self) -> tuple[list[Request], list[int]]:
        """Record the keys and values as computed.

        Returns:
            The requests whose context is complete, and for each the index into ``requests`` of the
            one whose logits it samples from.
        """
        complete: list[Request] = []
        sources: list[int] = []
        for index, (request, count) in enumerate(zip(self.requests, self.counts, strict=True)):
            request.kv_length += count
            if request.kv_length == len(request.token_ids):
                complete.append(request)
                sources.append(index)
        for request, index in self.copies:
            request.kv_length = len(request.token_ids)
            complete.append(request)
            sources.append(index)
        return complete, sources


def choose_batch(running: Sequence[Request], *, max_prefill_tokens: int) -> Batch:
    """Take one token of every decoding request, and context of the others within the limit."""
    decoding: list[Request] = []
    prefilling: list[Request] = []
    for request in running:
        is_decoding = len(request.token_ids) - request.kv_length == 1 and request.logprobs
        (decoding if is_decoding else prefilling).append(request)
    chosen: list[tuple[int, Request]] = []
    followers: list[tuple[Request, Request]] = []
    leaders: dict[tuple[int, ...], Request] = {}
    budget = max_prefill_tokens
    for request in prefilling:
        count = len(request.token_ids) - request.kv_length
        if not request.kv_length:
            leader = leaders.setdefault(tuple(request.token_ids), request)
            if leader is not request:
                followers.append((request, leader))
                continue
        if budget > 0:
            chosen.append((min(count, budget), request))
            budget -= count
    chosen.sort(key=lambda pair: pair[0])
    requests = decoding + [request for _, request in chosen]
    whole = {
        id(request): index
        for index, (count, request) in enumerate(chosen, len(decoding))
        if count == len(request.token_ids)
    }
    return Batch(
        requests=requests,
        counts=[1] * len(decoding) + [count for count, _ in chosen],
        num_decoding=len(decoding),
        copies=[(r, whole[id(leader)]) for r, leader in followers if id(leader) in whole],
    )
