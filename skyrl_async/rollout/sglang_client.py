"""One SGLang server over HTTP: generation as a stream, and what the pool asks beside it.

A reply is streamed, so that a server that dies leaves the tokens that it had sent. While requests
run, one watchdog looks for streams that bring nothing: it asks the server for ``/model_info``,
which its HTTP process answers without its scheduler, also during a weight load. No answer means
that the server hangs (or is stopped): the silent requests fail and may go on elsewhere. An answer
means patience until ``request_timeout_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_errors import (
    AbortedByServer,
    AdapterGone,
    BadReply,
    ConnectionLost,
    EngineError,
    EngineHangs,
    error_of_status,
)
from skyrl_async.rollout.sglang_protocol import (
    EventSplitter,
    Reply,
    StreamedReply,
    adapter_name,
    make_body,
    parse_version,
)
from skyrl_async.rollout.sglang_server_info import (
    EngineLoad,
    ServerInfo,
    newest_adapter,
    parse_load,
    parse_server_info,
)
from skyrl_async.types import Int32Array, Sampling

_KEEPALIVE_S = 2.0
"""The server closes idle connections after 5 s; one that it is closing must not be used again."""

_CHUNKS_PER_REPLY = 16
"""At most this many chunks, where each repeats the earlier ones: that costs the square of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """How long to wait.

    Attributes:
        connect_timeout_s: for a connection.
        request_timeout_s: for one whole generation.
        stall_timeout_s: for the next tokens, before the server is asked whether it is alive.
        control_timeout_s: for an answer to that, and to every call but generation.
        abort_timeout_s: for the tokens of an aborted request; then those received are all.
        stream_interval: tokens between two chunks.

    Raises:
        ValueError: if one is not positive.
    """

    connect_timeout_s: float = 5.0
    request_timeout_s: float = 600.0
    stall_timeout_s: float = 5.0
    control_timeout_s: float = 2.0
    abort_timeout_s: float = 2.0
    stream_interval: int = 32

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


@dataclass(slots=True)
class _Live:
    """A request whose reply is being read; ``deadline`` ends it, for ``reason``."""

    deadline: asyncio.Timeout
    heard_s: float
    reason: Literal["deadline", "stall", "abort", "closed"] = "deadline"
    aborted: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class SglangClient:
    """Talks to one server; see the module.

    ::

        client = SglangClient(endpoint, vocab_size=320)
        await client.server_info()                     # refuses a server that is too old
        reply = await client.generate(context, sampling, rid=new_rid(), extra_key="4")
        await client.close()

    Args:
        endpoint: of the server.
        vocab_size: of its model.
        limits: deadlines.
        adapters: whether a policy version is an adapter, which requests name, or the weights.
    """

    def __init__(
        self,
        endpoint: EngineEndpoint,
        *,
        vocab_size: int,
        limits: ClientLimits | None = None,
        adapters: bool = False,
    ) -> None:
        self._adapters = adapters
        self.endpoint = endpoint
        self.known_version = endpoint.policy_version
        self._vocab_size = vocab_size
        self._limits = limits or ClientLimits()
        self._url = endpoint.url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._incremental = False
        self._may_abort = True
        self._live: dict[str, _Live] = {}
        self._watchdog: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        rid: str,
        extra_key: str | None = None,
    ) -> Reply:
        """Continue ``token_ids``; cancelling the caller aborts the request on the server.

        With adapters the newest that is known is used. The finish reason is ABORT, too, if the
        server ended the request because of a newer one: go on from the tokens with that.

        Args:
            token_ids: ``[P]``, the whole context.
            sampling: how to sample.
            rid: of ``new_rid()``; names the request to :meth:`abort`.
            extra_key: namespace of the prefix cache.

        Raises:
            EngineError: with what can be kept as ``partial``.
        """
        version = self.known_version
        body = make_body(
            token_ids,
            sampling,
            rid=rid,
            vocab_size=self._vocab_size,
            extra_key=extra_key,
            adapter=adapter_name(version) if self._adapters else None,
            stream_interval=self._stream_interval(sampling),
        )
        stream = StreamedReply(known_version=version, by_adapter=self._adapters)
        try:
            return await self._stream(rid, body, stream)
        except asyncio.CancelledError:
            self._spawn(self._post_abort(rid))
            raise
        except EngineError as error:
            if stream.whole is not None:
                return stream.whole
            error.partial = error.partial or stream.certain()
            ended = self._adapters and isinstance(error, AbortedByServer | AdapterGone)
            if ended and await self._has_newer(version):
                return error.partial
            raise

    async def _has_newer(self, version: int) -> bool:
        """Return whether the server has a newer adapter, for which requests end early."""
        with contextlib.suppress(EngineError):
            return await self.reported_version() > version
        return False

    async def abort(self, rid: str) -> None:
        """End a request; its caller gets the tokens sampled so far. Unknown ids are ignored.

        A server whose key does not allow to abort is left instead: the caller gets what it sent.
        """
        live = self._live.get(rid)
        if live is None:
            return
        live.aborted = True
        if await self._post_abort(rid):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.abort_timeout_s):
                    await live.ended.wait()
        if not live.ended.is_set():
            self._end(live, "abort")

    async def loads(self) -> EngineLoad:
        """Return the load that the scheduler published last; does not wait for it.

        Raises:
            EngineError: if there is no answer, or another one.
        """
        return parse_load(await self._get("v1/loads"))

    async def reported_version(self) -> int:
        """Return the policy version that the server reports; does not wait for its scheduler.

        Raises:
            EngineError: if there is no answer, or its weights are not a policy version.
        """
        if self._adapters:
            version = newest_adapter(await self._get("v1/models"))
        else:
            version = parse_version((await self._get("model_info")).get("weight_version"))
        self.known_version = max(self.known_version, version)
        return version

    async def server_info(self) -> ServerInfo:
        """Return what the server is; the answer waits for its scheduler.

        Raises:
            EngineError: if there is no answer, or the server is too old.
        """
        info = parse_server_info(await self._get("server_info"))
        self._incremental = info.incremental
        return info

    async def check_generates(self) -> None:
        """Let the server generate one token.

        Raises:
            EngineError: if it does not, or not in time.
        """
        await self._get("health_generate", wants_json=False)

    async def close(self) -> None:
        """End the running requests and close the connections."""
        for live in self._live.values():
            self._end(live, "closed")
        tasks = [*self._background, *([self._watchdog] if self._watchdog else [])]
        if self._watchdog is not None:
            self._watchdog.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    @property
    def _name(self) -> str:
        return f"engine {self.endpoint.engine_id!r} at {self._url}"

    def _stream_interval(self, sampling: Sampling) -> int:
        interval = self._limits.stream_interval
        if self._incremental:
            return interval
        return max(interval, -(-sampling.max_tokens // _CHUNKS_PER_REPLY))

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            key = self.endpoint.api_key
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._limits.connect_timeout_s
                ),
                read_bufsize=1 << 20,
            )
        return self._session

    async def _stream(self, rid: str, body: dict[str, Any], stream: StreamedReply) -> Reply:
        """Read the stream to its end, or until something ends it early."""
        limit_s = self._limits.request_timeout_s
        live = _Live(asyncio.timeout(limit_s), asyncio.get_running_loop().time())
        try:
            async with live.deadline:
                self._live[rid] = live
                self._watch()
                return await self._read(live, body, stream)
        except AbortedByServer as error:
            if live.aborted and error.partial is not None:
                return error.partial
            raise
        except aiohttp.ClientError as error:
            raise ConnectionLost(f"{self._name}: {error!r}") from None
        except TimeoutError:
            if live.reason == "abort":
                return stream.certain()
            if live.reason == "closed":
                raise ConnectionLost(f"the connection to {self._name} was closed here") from None
            self._spawn(self._post_abort(rid))
            if live.reason == "stall":
                raise EngineHangs(
                    f"{self._name} sent nothing for {self._limits.stall_timeout_s} s and does not "
                    "answer /model_info"
                ) from None
            raise EngineHangs(
                f"{self._name} took longer than request_timeout_s={limit_s} for one reply"
            ) from None
        except OSError as error:
            raise ConnectionLost(f"{self._name}: {error!r}") from None
        finally:
            self._live.pop(rid, None)
            live.ended.set()
            self.known_version = max(self.known_version, stream.reported_version)

    async def _read(self, live: _Live, body: dict[str, Any], stream: StreamedReply) -> Reply:
        clock = asyncio.get_running_loop().time
        splitter = EventSplitter()
        async with self._connections().post(f"{self._url}/generate", json=body) as response:
            if response.status != 200:
                raise error_of_status(response.status, await response.text())
            async for data in response.content.iter_any():
                live.heard_s = clock()
                for payload in splitter.feed(data):
                    stream.feed(payload)
                self.known_version = max(self.known_version, stream.reported_version)
        if stream.whole is None:
            raise ConnectionLost(f"{self._name} ended the stream before the reply was whole")
        return stream.whole

    def _end(self, live: _Live, reason: Literal["stall", "abort", "closed"]) -> None:
        """Make the reader of a request raise TimeoutError now."""
        live.reason = reason
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            live.deadline.reschedule(asyncio.get_running_loop().time())

    def _watch(self) -> None:
        if self._watchdog is None or self._watchdog.done():
            self._watchdog = asyncio.create_task(self._watch_silence())

    async def _watch_silence(self) -> None:
        """End the silent requests of a server that does not answer, while there are requests."""
        clock = asyncio.get_running_loop().time
        stall_s = self._limits.stall_timeout_s
        while self._live:
            await asyncio.sleep(stall_s / 4)
            silent = [x for x in self._live.values() if clock() - x.heard_s >= stall_s]
            if not silent:
                continue
            answers = True
            try:
                await self._get("model_info")
            except EngineError as error:
                answers = not isinstance(error, EngineHangs | ConnectionLost)
            for live in silent:
                if answers:
                    live.heard_s = clock()
                elif clock() - live.heard_s >= stall_s:
                    self._end(live, "stall")

    async def _post_abort(self, rid: str) -> bool:
        """Return whether the server took the wish to abort."""
        if not self._may_abort:
            return False
        timeout = aiohttp.ClientTimeout(total=self._limits.control_timeout_s)
        try:
            async with self._connections().post(
                f"{self._url}/abort_request", json={"rid": rid}, timeout=timeout
            ) as response:
                if response.status in (401, 403):
                    self._may_abort = False
                return response.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def _get(self, path: str, *, wants_json: bool = True) -> dict[str, Any]:
        limit_s = self._limits.control_timeout_s
        timeout = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._connections().get(f"{self._url}/{path}", timeout=timeout) as response:
                if response.status != 200:
                    raise error_of_status(response.status, await response.text())
                answer = await response.json(content_type=None) if wants_json else {}
        except TimeoutError:
            raise EngineHangs(f"{self._name}: no answer to /{path} within {limit_s} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"{self._name}: /{path} {error!r}") from None
        except ValueError as error:
            if isinstance(error, EngineError):
                raise
            raise BadReply(f"{self._name}: /{path} is not JSON") from None
        if not isinstance(answer, dict):
            raise BadReply(f"{self._name}: /{path} is not an object")
        return answer

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something whose result nobody waits for."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
