"""A server that answers as SGLang 0.5.21 does, with tokens that follow from the context alone.

It refuses what the real one refuses, and dies of what the real one dies of. What goes wrong is
scripted: each generation takes the next list of :class:`Fault` from ``script``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

from skyrl_async.rollout.endpoint import EngineEndpoint

VOCAB_SIZE = 1000

BODY_KEYS = {
    *("rid", "input_ids", "sampling_params", "return_logprob", "stream", "extra_key"),
    "lora_path",
}
SAMPLING_KEYS = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos"),
    "stream_interval",
}


def next_token(context: list[int]) -> int:
    """The only token that can follow ``context``."""
    return zlib.crc32(json.dumps(context).encode()) % VOCAB_SIZE


def logprob_of(token_id: int) -> float:
    """Differs from token to token, so that a mix-up shows."""
    return -(token_id + 1) / 128


def continuation(context: list[int], count: int) -> list[int]:
    """What an undisturbed server generates."""
    whole = list(context)
    for _ in range(count):
        whole.append(next_token(whole))
    return whole[len(context) :]


@dataclass(frozen=True)
class Fault:
    """Something that happens before token number ``at`` of a reply is sampled.

    die: the whole server is gone, listening socket and all connections.
    cut: the connection of this reply is lost.
    stall: nothing comes until ``go_on`` is set.
    swap: the weights get the version ``value``.
    adapter: the adapter ``value`` is loaded, and all others are unloaded.
    abort: the server aborts the reply; error: the reply ends with the status ``value``.
    nan: the token has no logprob.
    """

    at: int
    kind: Literal["die", "cut", "stall", "swap", "adapter", "abort", "error", "nan"]
    value: Any = None


@dataclass(eq=False)
class _Live:
    rid: str
    context: list[int]
    sampling: dict[str, Any]
    faults: deque[Fault]
    transport: asyncio.Transport
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    sent: int = 0
    aborted: bool = False


class FakeSglang:
    """One server::

        async with FakeSglang(version="3") as server:
            server.script.append([Fault(20, "die")])
            client = SglangClient(server.endpoint("e0", 3), vocab_size=VOCAB_SIZE)

    Attributes:
        bodies: of all generations, in order.
        aborts: request ids of all abort calls.
        answering: while not set, it answers nothing, like a stopped process.
        running: while not set, it generates nothing, like a server that loads weights.
        go_on: ends a stall, which has set ``stalled``.
        adapters: names of those loaded; None for a server that serves none.
    """

    def __init__(
        self,
        *,
        version: str = "3",
        server_version: str = "0.5.21",
        incremental: bool = False,
        api_key: str | None = None,
        may_abort: bool = True,
        context_length: int = 512,
        adapters: list[str] | None = None,
    ) -> None:
        self.adapters = adapters
        self.version = version
        self.server_version = server_version
        self.incremental = incremental
        self.api_key = api_key
        self.may_abort = may_abort
        self.context_length = context_length
        self.script: deque[list[Fault]] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.aborts: list[str] = []
        self.kv_usage = 0.0
        self.foreign = 0
        self.status = 200
        self.answering = asyncio.Event()
        self.answering.set()
        self.running = asyncio.Event()
        self.running.set()
        self.go_on = asyncio.Event()
        self.dead = False
        self.stalled = asyncio.Event()
        self.port = 0
        self._live: dict[str, _Live] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeSglang:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for event in (self.go_on, self.running, self.answering):
            event.set()
        await self._stop()

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        app = web.Application(middlewares=[self._gate])
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health_generate", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.dead = False

    def endpoint(self, engine_id: str = "e0", policy_version: int = 3) -> EngineEndpoint:
        return EngineEndpoint(
            engine_id=engine_id,
            url=f"http://127.0.0.1:{self.port}",
            api_key=self.api_key,
            policy_version=policy_version,
        )

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def die(self) -> None:
        """Lose the listening socket and all connections at once."""
        self.dead = True
        for live in self._live.values():
            live.transport.abort()
        await self._stop()

    async def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        await self.answering.wait()
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _models(self, request: web.Request) -> web.Response:
        names = ["the/model", *(self.adapters or ())]
        return web.json_response({"object": "list", "data": [{"id": name} for name in names]})

    async def _server_info(self, request: web.Request) -> web.Response:
        await self.running.wait()
        return web.json_response(
            {"version": self.server_version, "incremental_streaming_output": self.incremental}
        )

    async def _health(self, request: web.Request) -> web.Response:
        await self.running.wait()
        return web.Response()

    async def _loads(self, request: web.Request) -> web.Response:
        rank = {
            "num_running_reqs": len(self._live),
            "num_waiting_reqs": self.foreign,
            "token_usage": self.kv_usage,
        }
        return web.json_response({"version": self.server_version, "loads": [rank]})

    async def _abort(self, request: web.Request) -> web.Response:
        if not self.may_abort:
            return web.json_response({"error": "Unauthorized"}, status=401)
        rid = (await request.json())["rid"]
        assert rid, "an empty rid is a prefix of all"
        self.aborts.append(rid)
        for live in self._live.values():
            live.aborted = live.aborted or live.rid.startswith(rid)
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert set(body) <= BODY_KEYS, f"unknown {set(body) - BODY_KEYS}"
        assert set(body["sampling_params"]) <= SAMPLING_KEYS
        assert body["return_logprob"] is True
        assert body["stream"] is True
        assert len(body["rid"]) == 32 and body["rid"] not in self._live
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "not now"}}, status=self.status)
        if not all(0 <= token_id < VOCAB_SIZE for token_id in body["input_ids"]):
            await self.die()
            raise AssertionError("a token id outside the vocabulary")
        if (adapter := body.get("lora_path")) is not None:
            assert self.adapters is not None, "LoRA is not enabled"
            if adapter not in self.adapters:
                text = f"Got LoRA adapter that has never been loaded: {adapter}"
                return web.json_response({"error": {"message": text}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sampling = body["sampling_params"]
        if len(body["input_ids"]) + sampling["max_new_tokens"] > self.context_length:
            error = {"message": "Requested token count exceeds the limit", "code": 400}
            await self._send(response, {"error": {**error, "retryable": False}})
            return await self._end(response)
        faults = deque(self.script.popleft() if self.script else [])
        assert request.transport is not None
        live = _Live(body["rid"], body["input_ids"], sampling, faults, request.transport)
        self._live[live.rid] = live
        try:
            reason = await self._decode(live, response)
            if reason is not None:
                await self._send(response, self._chunk(live, reason))
                return await self._end(response)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            del self._live[live.rid]
        return response

    async def _decode(self, live: _Live, response: web.StreamResponse) -> Any:
        """Sample until something ends it; return the finish reason, or None if nobody reads it."""
        interval = live.sampling["stream_interval"]
        while True:
            await self.running.wait()
            ended = await self._apply_faults(live)
            if ended or self.dead:
                return ended or None
            if live.aborted:
                return {"type": "abort", "message": "Aborted"}
            token_id = next_token(live.context + live.token_ids)
            live.token_ids.append(token_id)
            if len(live.logprobs) < len(live.token_ids):
                live.logprobs.append(logprob_of(token_id))
            live.labels.append(self.version)
            stops = live.sampling["stop_token_ids"]
            if token_id in stops and not live.sampling["ignore_eos"]:
                return {"type": "stop", "matched": token_id}
            if len(live.token_ids) == live.sampling["max_new_tokens"]:
                return {"type": "length", "length": len(live.token_ids)}
            if len(live.token_ids) % interval == (1 if interval > 1 else 0):
                await self._send(response, self._chunk(live, None))
                await asyncio.sleep(0)

    async def _apply_faults(self, live: _Live) -> Any:
        while live.faults and live.faults[0].at <= len(live.token_ids):
            fault = live.faults.popleft()
            if fault.kind == "die":
                self.dead = True
                await self._flushed(live)
                asyncio.get_running_loop().call_soon(self._die_soon)
                return None
            if fault.kind == "cut":
                await self._flushed(live)
                live.transport.abort()
                raise ConnectionResetError
            if fault.kind == "stall":
                self.stalled.set()
                await self.go_on.wait()
            elif fault.kind == "swap":
                self.version = fault.value
            elif fault.kind == "adapter":
                self.adapters = [fault.value]
            elif fault.kind == "nan":
                live.logprobs.append(None)
            elif fault.kind == "abort":
                return {"type": "abort", "message": "Server is shutting down"}
            elif fault.kind == "error":
                return {"type": "abort", "message": "no", "status_code": fault.value}
        return None

    async def _flushed(self, live: _Live) -> None:
        """Return when the peer may have read what was sent."""
        while live.transport.get_write_buffer_size():
            await asyncio.sleep(0)
        await asyncio.sleep(0.005)

    def _die_soon(self) -> None:
        self._dying = asyncio.ensure_future(self.die())

    def _chunk(self, live: _Live, reason: Any) -> dict[str, Any]:
        start = live.sent if self.incremental else 0
        live.sent = len(live.token_ids)
        pairs = list(zip(live.logprobs, live.token_ids, strict=True))[start:]
        meta = {
            "id": live.rid,
            "finish_reason": reason,
            "prompt_tokens": len(live.context),
            "cached_tokens": 1,
            "completion_tokens": len(live.token_ids),
            "weight_version": self.version,
            "output_token_logprobs": [[p, t, None] for p, t in pairs],
            "output_token_logprobs_length": len(live.token_ids),
        }
        if reason is not None:
            meta["weight_versions"] = _spans(live.labels, self.version)
            meta["weight_version"] = meta["weight_versions"][-1]["version"]
        return {"text": "", "output_ids": live.token_ids[start:], "meta_info": meta}

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    async def _end(self, response: web.StreamResponse) -> web.StreamResponse:
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _spans(labels: list[str], current: str) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        if spans and spans[-1]["version"] == label:
            spans[-1]["end"] = index + 1
        else:
            spans.append({"version": label, "start": index, "end": index + 1})
    return spans or [{"version": current, "start": 0, "end": 0}]


@contextlib.asynccontextmanager
async def servers(count: int, **options: Any):
    """Several servers."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeSglang(**options)) for _ in range(count)]
