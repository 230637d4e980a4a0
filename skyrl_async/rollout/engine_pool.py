"""Many engine servers behind the interface of one; see :class:`EnginePool`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

from skyrl_async.metrics.trace import NULL_TRACER, Tracing
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.rollout.engine_errors import EngineError, UnverifiedWeights
from skyrl_async.rollout.engine_routing import ConcurrencyLimit, Member, Router
from skyrl_async.rollout.pool_meter import BusySpans, PoolMeter
from skyrl_async.rollout.pool_request import CacheNamespaces, PoolRequest, fit_context
from skyrl_async.rollout.pool_watch import PoolWatch
from skyrl_async.rollout.sglang_client import ClientLimits, SglangClient
from skyrl_async.rollout.sglang_protocol import Reply, new_rid
from skyrl_async.types import FinishReason, Generation, Int32Array, Sampling

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
"""For an answer that the server's scheduler is not needed for."""


class EnginePool:
    """The engines that a rollout actor plays with; an ``Engine`` of it.

    ::

        pool = EnginePool(vocab_size=320, context_length=2048)
        runner = asyncio.create_task(pool.run())
        pool.set_engines(endpoints)               # again at every change
        generation = await pool.generate(context, sampling, request_id="7-0/0", session_id="7-0")

    A request whose engine fails or leaves goes on elsewhere, from its context and the tokens that
    it has, on an engine whose version is not behind its last token. If every usable engine is
    behind, the tokens are discarded and the turn starts again: versions must not decrease within a
    generation. Requests wait while no engine is usable; the caller's deadline bounds that.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        kv_after_swap: Literal["recompute", "keep"] = "recompute",
        max_concurrent: int = 256,
        stall_timeout_s: float = 5.0,
        request_timeout_s: float = 600.0,
        stream_interval: int = 32,
        max_failures: int = 5,
        poll_interval_s: float = 1.0,
        waits_for_engines: bool = True,
        adapters: bool = False,
        tracer: Tracing = NULL_TRACER,
    ) -> None:
        """Start without engines.

        Args:
            vocab_size: of the model; token ids are below it.
            context_length: tokens of one request, prompt and reply together.
            kv_after_swap: what the engines do at a weight swap.
            max_concurrent: requests that one engine is given at once; further ones wait.
            stall_timeout_s: silence of an engine before it is asked whether it is alive.
            request_timeout_s: of one reply of one engine.
            stream_interval: tokens between two chunks; fewer are lost with an engine, at more cost.
            max_failures: of engines with one request, before the request fails.
            poll_interval_s: between two looks at an engine's load.
            waits_for_engines: false fails requests when an engine fails.
            adapters: whether a policy version is an adapter, which requests name.
            tracer: gets a lane for each engine.

        Raises:
            ValueError: if a number is out of range.
        """
        if min(vocab_size, context_length, max_concurrent, max_failures, poll_interval_s) <= 0:
            raise ValueError(
                f"vocab_size={vocab_size}, context_length={context_length}, "
                f"max_concurrent={max_concurrent}, max_failures={max_failures} and "
                f"poll_interval_s={poll_interval_s} must be > 0"
            )
        if kv_after_swap not in ("recompute", "keep"):
            raise ValueError(f"kv_after_swap must be recompute or keep, got {kv_after_swap!r}")
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._recomputes = kv_after_swap == "recompute"
        self._max_concurrent = max_concurrent
        self._max_failures = max_failures
        self._poll_interval_s = poll_interval_s
        self._waits_for_engines = waits_for_engines
        self._limits = ClientLimits(
            request_timeout_s=request_timeout_s,
            stall_timeout_s=stall_timeout_s,
            control_timeout_s=min(stall_timeout_s, _ANSWER_TIMEOUT_S),
            stream_interval=stream_interval,
        )
        self._adapters = adapters
        self._router, self._tracer = Router(), tracer
        self._meter = PoolMeter()
        self._requests: dict[str, PoolRequest] = {}
        self._namespaces = CacheNamespaces(by_version=self._recomputes or adapters)
        self._newest_version = 0
        self._watch = PoolWatch(
            poll_interval_s=poll_interval_s,
            on_look=self._router.assign,
            on_failure=self._suspect,
        )
        self._aborts: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def policy_version(self) -> int:
        """The newest version that an engine was said to have, or reported."""
        versions = (m.client.known_version for m in self._router.members.values())
        self._newest_version = max(self._newest_version, *versions, 0)
        return self._newest_version

    def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Make these the engines; failed ones among them are trusted again.

        Args:
            endpoints: with different ids. Requests on engines that are not among them go on on
                others.

        Raises:
            ValueError: if two have the same id.
        """
        wanted = {endpoint.engine_id: endpoint for endpoint in endpoints}
        if len(wanted) != len(endpoints):
            raise ValueError(f"engine ids must differ, got {[e.engine_id for e in endpoints]}")
        members = self._router.members
        for name, member in list(members.items()):
            if name not in wanted or not member.client.endpoint.same_server(wanted[name]):
                self._remove(member)
        for name, endpoint in wanted.items():
            if name in members:
                client = members[name].client
                client.known_version = max(client.known_version, endpoint.policy_version)
                members[name].failure = None
            else:
                self._add(endpoint)
        self._router.assign()

    def suspects(self) -> tuple[str, ...]:
        """Return the ids of engines found dead or hanging, which get no new requests."""
        return tuple(n for n, m in self._router.members.items() if m.failure is not None)

    def pinned(self, endpoint: EngineEndpoint) -> EnginePool:
        """Return a pool of one engine that fails with it instead of waiting for others."""
        pool = EnginePool(
            vocab_size=self._vocab_size,
            context_length=self._context_length,
            kv_after_swap="recompute" if self._recomputes else "keep",
            max_concurrent=self._max_concurrent,
            stall_timeout_s=self._limits.stall_timeout_s,
            request_timeout_s=self._limits.request_timeout_s,
            stream_interval=self._limits.stream_interval,
            poll_interval_s=self._poll_interval_s,
            waits_for_engines=False,
            adapters=self._adapters,
        )
        pool.set_engines([endpoint])
        return pool

    async def run(self) -> None:
        """Watch the engines until cancelled.

        Raises:
            RuntimeError: if a server is too old.
        """
        try:
            await self._watch.run()
        finally:
            self._stopped = True
            self._router.fail_waiting(RuntimeError("the engine pool stopped"))
            await asyncio.gather(*self._aborts, return_exceptions=True)

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str | None = None,
    ) -> Generation:
        """Continue ``token_ids``; see :meth:`EngineClient.generate`."""
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already in use")
        context, sampling = fit_context(token_ids, sampling, self._context_length)
        request = PoolRequest(context, sampling, session_id=session_id, name=request_id)
        self._requests[request_id] = request
        try:
            reason = request.finish_reason
            while reason is None:
                reason = await self._try_one(request) or request.finish_reason
        finally:
            del self._requests[request_id]
        self._meter.request_finishes(len(request.token_ids))
        return request.generation(reason)

    def abort(self, request_id: str) -> None:
        """End a request; its waiter gets the tokens sampled so far. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.aborted = True
        if request.ticket is not None:
            self._router.withdraw(request.ticket)
        elif request.member is not None:
            self._abort_on_engine(request, request.member)

    def release(self, session_id: str) -> None:
        """Say that no further turn of a session will come. Unknown ids are ignored."""
        self._router.forget(session_id)
        self._namespaces.forget(session_id)

    def take_stats(self) -> EngineStats:
        """Return what the pool did since the last call."""
        router = self._router
        return self._meter.take(running=router.num_running, waiting=router.num_waiting)

    async def pause(self) -> None:
        """Raise RuntimeError: weights reach a server through the worker beside it."""
        _refuse("pause")

    async def resume(self) -> None:
        """Raise RuntimeError: weights reach a server through the worker beside it."""
        _refuse("resume")

    async def load_weights(self, weights: Mapping[str, Tensor], *, policy_version: int) -> None:
        """Raise RuntimeError: weights reach a server through the worker beside it."""
        _refuse("load_weights")

    def _add(self, endpoint: EngineEndpoint) -> None:
        client = SglangClient(
            endpoint, vocab_size=self._vocab_size, limits=self._limits, adapters=self._adapters
        )
        lane = self._tracer.lane(role="engine", name=f"decode on {endpoint.engine_id}")
        member = Member(client, ConcurrencyLimit(self._max_concurrent), busy=BusySpans(lane))
        self._router.members[endpoint.engine_id] = member
        self._watch.add(member)

    def _remove(self, member: Member) -> None:
        self._newest_version = self.policy_version
        del self._router.members[member.engine_id]
        member.removed.set()
        for request in self._requests.values():
            if request.member is member:
                self._abort_on_engine(request, member)

    def _abort_on_engine(self, request: PoolRequest, member: Member) -> None:
        task = asyncio.create_task(member.client.abort(request.rid))
        member.aborts.add(task)
        self._aborts.add(task)
        task.add_done_callback(member.aborts.discard)
        task.add_done_callback(self._aborts.discard)

    async def _try_one(self, request: PoolRequest) -> FinishReason | None:
        """Let one engine generate; return what ended the reply, or None if it is not whole."""
        member = await self._wait_for_engine(request)
        if member is None:
            return None
        request.member, request.rid = member, new_rid()
        self._meter.request_starts()
        try:
            return await self._generate_on(member, request)
        except EngineError as error:
            self._take_failure(request, member, error)
            return None
        finally:
            request.member = None
            self._meter.request_ends()
            self._router.leave(member)

    async def _generate_on(self, member: Member, request: PoolRequest) -> FinishReason | None:
        if member.client.known_version < request.min_version:
            version = await member.client.reported_version()
            if version < request.min_version:
                logger.info(
                    "request %s: %d tokens up to version %d are discarded, engines are at %d",
                    *(request.name, len(request.token_ids), request.min_version, version),
                )
                request.discard()
        if request.aborted or member.removed.is_set():
            return None
        context, sampling = request.remaining()
        namespace = self._namespaces.name(
            request.session_id, request.name, version=member.client.known_version
        )
        reply = await member.client.generate(
            context, sampling, rid=request.rid, extra_key=namespace
        )
        self._take_reply(request, reply)
        return None if reply.finish_reason is FinishReason.ABORT else reply.finish_reason

    async def _wait_for_engine(self, request: PoolRequest) -> Member | None:
        """Return an engine with room; None if the request was aborted meanwhile."""
        if self._stopped:
            raise RuntimeError("the engine pool stopped")
        for member in () if self._waits_for_engines else self._router.members.values():
            if member.failure is not None:
                raise member.failure
        ticket = self._router.enter(request.session_id, min_version=request.min_version)
        request.ticket = ticket
        try:
            return await ticket.assigned
        except asyncio.CancelledError:
            self._router.give_up(ticket)
            raise
        finally:
            request.ticket, request.queued_s = None, request.queued_s + ticket.queued_s

    def _take_reply(self, request: PoolRequest, reply: Reply) -> None:
        self._meter.count_reply(reply, recomputed_at_swap=self._recomputes)
        request.append(reply)

    def _take_failure(self, request: PoolRequest, member: Member, error: EngineError) -> None:
        """Keep what the engine had sent, and raise if the request cannot go on."""
        if not error.retryable:
            raise error
        if error.partial is not None:
            try:
                self._take_reply(request, error.partial)
            except UnverifiedWeights as worse:
                error = worse
        if member.removed.is_set():
            return
        self._suspect(member, error)
        request.failures += 1
        fails = request.failures >= self._max_failures or not self._waits_for_engines
        if request.finish_reason is None and fails:
            raise error

    def _suspect(self, member: Member, error: EngineError) -> None:
        if member.failure is None:
            logger.warning("engine %s gets no new requests: %s", member.engine_id, error)
        member.failure = error
        if not self._waits_for_engines:
            self._router.fail_waiting(error)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"EnginePool.{name}: the worker beside an SGLang server loads its weights")
