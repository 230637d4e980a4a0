"""An engine in this process: continuous batching around a `transformers` causal LM.

Everything runs on one asyncio loop. :meth:`EmbeddedEngine.run` computes one decode step, a single
forward pass that carries one token of each decoding request and the new context of requests just
admitted, resolves the requests that finished, and then lets the other coroutines run, so that all
episodes that became ready are served by the next step. Because a step never awaits, every other
method runs at a token boundary, and a weight swap is plain assignment.

Example: a two-turn session. Turn 0 sends ``[u g n a]`` and gets ``[5 .]``; turn 1 sends
``[u g n a 5 . u hi a]``, of which only ``[. u hi a]`` is computed, because the keys and values of
``[u g n a 5]`` are still in the session's slot.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from skyrl_async.metrics.trace import NULL_LANE, Lane
from skyrl_async.rollout.engine_batch import Batch, Request, choose_batch
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.rollout.engine_meter import EngineMeter
from skyrl_async.rollout.kv_slots import SlotCache
from skyrl_async.rollout.packed_forward import make_packed_forward
from skyrl_async.rollout.sampler import sample_tokens
from skyrl_async.rollout.slot_attention import to_device
from skyrl_async.rollout.slot_table import SlotTable
from skyrl_async.rollout.weight_exchange import exchange_parameters
from skyrl_async.types import FinishReason, Generation, Int32Array, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_YIELDS_AFTER_FINISH = 4
"""Rounds of the event loop in which a finished request's episode may bring its next one."""


class EmbeddedEngine:
    """Continuous batching in this process; an :class:`EngineClient`.

    The same seed and the same order of requests give the same tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_concurrent: int,
        context_length: int,
        kv_after_swap: Literal["recompute", "keep"] = "recompute",
        num_slots: int | None = None,
        max_prefill_tokens: int = 2048,
        seed: int = 0,
        policy_version: int = 0,
        lane: Lane = NULL_LANE,
    ) -> None:
        """Take over ``model``: nobody else may change its parameters or attention.

        Args:
            model: a causal LM on the device to compute on; layers may have sliding windows.
            max_concurrent: requests decoded at once; further ones wait.
            context_length: tokens of one request, prompt and reply together.
            kv_after_swap: ``recompute`` computes the context of running requests again under the
                new weights and forgets what was retained for sessions, so that every logprob is
                that of a plain forward pass of the version recorded for it; ``keep`` goes on with
                keys and values of mixed versions.
            num_slots: KV slots, at least and by default ``max_concurrent``; more retain more
                sessions whose episodes wait for their environment.
            max_prefill_tokens: context tokens computed beside one decode step.
            seed: of the sampling.
            policy_version: of the model's present weights.
            lane: of the timeline.

        Raises:
            ValueError: if a limit is out of range or the model cannot be used.
        """
        slots = max_concurrent if num_slots is None else num_slots
        if not 1 <= max_concurrent <= slots:
            raise ValueError(
                f"max_concurrent must be in 1..num_slots, got {max_concurrent} of {slots} slots"
            )
        if context_length < 2 or max_prefill_tokens < 1:
            raise ValueError(
                f"context_length must be >= 2 and max_prefill_tokens >= 1, got {context_length} "
                f"and {max_prefill_tokens}"
            )
        if kv_after_swap not in ("recompute", "keep"):
            raise ValueError(f"kv_after_swap must be recompute or keep, got {kv_after_swap!r}")
        self._model = model.eval()
        self._vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self._max_concurrent = max_concurrent
        self._context_length = context_length
        self._recompute = kv_after_swap == "recompute"
        self._max_prefill_tokens = max_prefill_tokens
        self._policy_version = policy_version
        self._cache = SlotCache(num_slots=slots, context_length=context_length)
        self._forward = make_packed_forward(model, self._cache)
        self._slots = SlotTable(num_slots=slots)
        self._generator = torch.Generator().manual_seed(seed)
        self._live: dict[str, Request] = {}
        self._live_sessions: dict[str, Request] = {}
        self._running: list[Request] = []
        self._continuing: deque[Request] = deque()
        self._new: deque[Request] = deque()
        self._wake = asyncio.Event()
        self._paused = False
        self._state: Literal["ready", "running", "stopped"] = "ready"
        self._meter = EngineMeter(lane=lane)

    @property
    def policy_version(self) -> int:
        """Version of the weights that compute the next token."""
        return self._policy_version

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the KV slots at present."""
        return self._cache.size_bytes

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str | None = None,
    ) -> Generation:
        """Continue ``token_ids``; see :meth:`EngineClient.generate`.

        Cancelling the caller withdraws the request.
        """
        request = self._accept(token_ids, sampling, request_id, session_id)
        try:
            return await request.future
        finally:
            if self._live.get(request_id) is request:
                self._remove(request)

    def abort(self, request_id: str) -> None:
        """End a request; its waiter gets the tokens sampled so far. Unknown ids are ignored."""
        request = self._live.get(request_id)
        if request is not None:
            self._remove(request)
            self._resolve(request, FinishReason.ABORT)

    def release(self, session_id: str) -> None:
        """Forget what is retained for a session, now or when its live request ends."""
        request = self._live_sessions.pop(session_id, None)
        if request is not None:
            request.session_id = None
        retained = self._slots.claim(session_id)
        if retained is not None:
            self._slots.put_back(retained.slot)

    async def pause(self) -> None:
        """Compute nothing until :meth:`resume`; all requests are kept."""
        self._paused = True

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._paused = False
        self._wake.set()

    async def load_weights(
        self, weights: Mapping[str, torch.Tensor], *, policy_version: int
    ) -> None:
        """Swap in ``weights``; see :meth:`EngineClient.load_weights`.

        The given tensors become the parameters and must not be written to until the next call has
        returned; those of the call before are then free. In host memory, for a model on another
        device, they are copied instead and are free at once.
        """
        if policy_version <= self._policy_version:
            raise ValueError(
                f"policy_version must increase: the engine has {self._policy_version}, "
                f"got {policy_version}"
            )
        self._meter.work_starts()
        exchange_parameters(self._model, weights)
        self._policy_version = policy_version
        if self._recompute:
            self._slots.invalidate_retained()
            for request in self._running:
                request.stale_length = max(request.stale_length, request.kv_length)
            for request in self._live.values():
                request.kv_length = 0
        self._meter.swap_ends(policy_version)

    def take_stats(self) -> EngineStats:
        """Return what happened since the previous call, and start counting anew."""
        waiting = len(self._continuing) + len(self._new)
        return self._meter.take(running=len(self._running), waiting=waiting)

    async def run(self) -> None:
        """Serve requests until cancelled.

        Raises:
            RuntimeError: if it runs already or has stopped; whatever a forward pass raises. All
                waiters then get a RuntimeError.
        """
        if self._state != "ready":
            raise RuntimeError(f"the engine is {self._state}; run() can be called once")
        self._state = "running"
        cause: BaseException | None = None
        try:
            while True:
                if self._paused or not self._live:
                    self._wake.clear()
                    self._meter.becomes_idle(paused=self._paused)
                    await self._wake.wait()
                    self._meter.wakes()
                    continue
                finished = self._step()
                for _ in range(_YIELDS_AFTER_FINISH if finished else 1):
                    await asyncio.sleep(0)
        except BaseException as error:
            cause = error
            raise
        finally:
            self._stop(cause)

    def _stop(self, cause: BaseException | None) -> None:
        self._state = "stopped"
        self._meter.becomes_idle()
        for request in list(self._live.values()):
            self._remove(request)
            error = RuntimeError(f"the engine stopped before the request ended: {cause!r}")
            error.__cause__ = cause
            request.fail(error)

    def _accept(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        request_id: str,
        session_id: str | None,
    ) -> Request:
        """Check a request and put it in a queue; a retained slot is claimed at once."""
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
        self._check(ids, request_id, session_id)
        request = Request(
            request_id=request_id,
            session_id=session_id,
            sampling=sampling,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            token_ids=ids,
            prompt_length=len(ids),
            max_length=min(len(ids) + sampling.max_tokens, self._context_length),
            future=asyncio.get_running_loop().create_future(),
            queued_at_s=time.monotonic() if len(self._live) >= self._max_concurrent else None,
        )
        self._live[request_id] = request
        retained = None
        if session_id is not None:
            self._live_sessions[session_id] = request
            retained = self._slots.claim(session_id)
        if retained is None:
            self._new.append(request)
        else:
            request.slot = retained.slot
            reusable = min(len(retained.token_ids), len(ids) - 1)
            if ids[:reusable] == retained.token_ids[:reusable]:
                request.kv_length = reusable
            self._continuing.append(request)
        self._wake.set()
        return request

    def _check(self, ids: list[int], request_id: str, session_id: str | None) -> None:
        if self._state == "stopped":
            raise RuntimeError("the engine has stopped and takes no requests")
        if not ids:
            raise ValueError("token_ids must not be empty")
        if len(ids) >= self._context_length:
            raise ValueError(
                f"token_ids has {len(ids)} tokens, which leaves no room for a reply within "
                f"context_length {self._context_length}; shorten it or raise context_length"
            )
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self._vocab_size}")
        if request_id in self._live:
            raise ValueError(f"request_id {request_id!r} is in use by a live request")
        if session_id is not None and session_id in self._live_sessions:
            raise ValueError(f"session {session_id!r} already has a live request")

    def _remove(self, request: Request) -> None:
        """Forget a live request and return its slot, or retain it for its session."""
        for queue in (self._running, self._continuing, self._new):
            if request in queue:
                queue.remove(request)
        self._release_resources(request)

    def _release_resources(self, request: Request) -> None:
        del self._live[request.request_id]
        session_id, slot = request.session_id, request.slot
        if session_id is not None:
            del self._live_sessions[session_id]
        if slot < 0:
            return
        if session_id is not None and request.kv_length:
            self._slots.retain(session_id, slot, request.token_ids[: request.kv_length])
        else:
            self._slots.put_back(slot)

    def _resolve(self, request: Request, reason: FinishReason) -> None:
        self._meter.request_ends()
        if not request.future.done():
            request.future.set_result(request.generation(reason))

    def _admit(self) -> None:
        """Move requests from the queues to the running ones, those with a slot first."""
        before = len(self._running)
        room = self._max_concurrent - before
        while room > 0 and self._continuing:
            self._running.append(self._continuing.popleft())
            room -= 1
        while room > 0 and self._new and (slot := self._slots.take()) is not None:
            self._new[0].slot = slot
            self._running.append(self._new.popleft())
            room -= 1
        for request in self._running[before:]:
            request.leaves_queue()

    @torch.inference_mode()
    def _step(self) -> bool:
        """Compute one forward pass and append its tokens; return whether a request ended."""
        self._meter.work_starts()
        self._admit()
        batch = choose_batch(self._running, max_prefill_tokens=self._max_prefill_tokens)
        device = self._model.device
        rows = [
            (request.slot, request.kv_length, count)
            for request, count in zip(batch.requests, batch.counts, strict=True)
        ]
        plan = self._cache.plan(rows, device=device)
        ids = to_device(np.array([batch.new_token_ids], np.int64), device)
        prefilled, reprefilled = batch.count_prefill()
        complete, sources = batch.advance()
        wanted = to_device(plan.last_tokens[sources], device)
        logits = self._forward(ids, plan, wanted)
        self._copy_contexts(batch)
        finished = self._append(complete, logits) if complete else False
        self._meter.step_ends(
            generated=len(complete),
            prefilled=prefilled,
            reprefilled=reprefilled,
            running=bool(self._running),
        )
        return finished

    def _copy_contexts(self, batch: Batch) -> None:
        if batch.copies:
            self._cache.copy_prefix(
                [batch.requests[index].slot for _, index in batch.copies],
                [request.slot for request, _ in batch.copies],
                length=max(request.kv_length for request, _ in batch.copies),
            )

    def _append(self, complete: list[Request], logits: torch.Tensor) -> bool:
        """Sample a token for each row of ``logits``; end the requests that are done or broken."""
        samplings = [request.sampling for request in complete]
        token_ids, logprobs = sample_tokens(logits, samplings, generator=self._generator)
        version, ended = self._policy_version, set()
        for request, token_id, logprob in zip(complete, token_ids, logprobs, strict=True):
            if math.isnan(logprob):
                ended.add(request)
                self._fail_nonfinite(request)
                continue
            reason = request.append(token_id, logprob, version)
            if reason is not None:
                ended.add(request)
                self._release_resources(request)
                self._resolve(request, reason)
        if ended:
            self._running = [request for request in self._running if request not in ended]
        return bool(ended)

    def _fail_nonfinite(self, request: Request) -> None:
        """Fail a request, and keep NaN in its slot from reaching the next user of the slot."""
        self._cache.clear(request.slot)
        request.kv_length = 0
        self._release_resources(request)
        request.fail(
            RuntimeError(
                f"logits of request {request.request_id!r} are not finite after "
                f"{len(request.token_ids)} tokens under policy version {self._policy_version}; "
                "the weights of that version have diverged or were corrupted"
            )
        )
