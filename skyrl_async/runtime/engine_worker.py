"""The worker beside one SGLang server: it keeps the server alive and loads weights into it.

The bytes of a new version arrive in this process while the server decodes; only the copy from here
into the server stops it. Only this worker uses the server's admin key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_async.config import Config
from skyrl_async.coordination.engine_fleet import EngineReport
from skyrl_async.metrics.trace import NULL_LANE, NULL_TRACER, Lane, Tracing, open_tracer
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.runtime.published_adapters import (
    adapter_layout,
    adapter_loader,
    publishes_adapters,
    served_adapters,
)
from skyrl_async.runtime.server_settings import external_server, server_settings

if TYPE_CHECKING:
    from skyrl_async.weight_sync.receiving import Address
    from skyrl_async.weight_sync.sglang_loader import LoadReport

logger = logging.getLogger(__name__)


def server_names(config: Config) -> tuple[str, ...]:
    """Return the names of the engines that are workers of their own; none with embedded engines."""
    if config.engine.kind == "embedded":
        return ()
    count = len(config.engine.urls) or config.engine.num_engines
    return tuple(f"engine {index}" for index in range(count))


class ServerWatch(Protocol):
    """Watches one server, whether it is ours or somebody else's."""

    @property
    def status(self) -> Any:
        """Its ``state``, ``incarnation``, ``server`` and ``detail``."""
        ...

    async def wait_healthy(self, *, timeout_s: float) -> Any:
        """Return when the server answers."""
        ...

    def expect_silence(self, timeout_s: float) -> AbstractContextManager[None]:
        """Do not take a blocked scheduler for a hang inside."""
        ...

    def restart(self, reason: str) -> None:
        """End this incarnation: its weights are of no version."""
        ...

    async def run(self) -> None:
        """Watch until closed."""
        ...

    async def close(self) -> None:
        """End the server if it is ours."""
        ...


class EngineWorker:
    """See :class:`skyrl_async.coordination.engine_fleet.EngineWorker`.

    ::

        worker = EngineWorker(config, index=0, folder=run_folder)
        await worker.start()                    # the server is healthy, its weights unverified
        await worker.connect(address)           # of the learner's sender
        report = await worker.poll(wait_s=1.0)  # policy_version >= 0 once a version is loaded
        await worker.close()

    Args:
        config: of the run.
        index: of this engine, from 0.
        folder: of the run; gets the server's log.
    """

    def __init__(self, config: Config, *, index: int, folder: Path) -> None:
        self._config = config
        self._name = server_names(config)[index]
        self._index = index
        self._folder = folder
        self._supervisor: ServerWatch
        self._running: asyncio.Task[None] | None = None
        self._receiver: Any = None
        self._transport: Any = None
        self._control: Any = None
        self._loader: Any = None
        self._policy_version = -1
        self._loading = asyncio.Lock()
        self._news = asyncio.Event()
        self._detail = ""
        self._stall_s = 0.0
        self._loads = 0
        self._reported_incarnation = 0
        self._tracer: Tracing = NULL_TRACER
        self._lane: Lane = NULL_LANE

    async def start(self, *, host: str = "127.0.0.1") -> Mapping[str, Any]:
        """Start the server and wait until it is healthy; return where this worker runs.

        Args:
            host: address for the server to listen on, as rollout actors can reach it.

        Raises:
            RuntimeError: if it does not start, with the last lines of its log.
        """
        from skyrl_async.learner.policy import skeleton
        from skyrl_async.rollout.engine_supervisor import EngineSupervisor
        from skyrl_async.rollout.external_server import ExternalServer
        from skyrl_async.rollout.sglang_server_info import adapter_problem
        from skyrl_async.runtime.settings import policy_source
        from skyrl_async.weight_sync.export_names import export_names
        from skyrl_async.weight_sync.layout import WeightLayout

        config = self._config
        self._tracer = open_tracer(
            self._folder if config.logging.trace else None, process=self._name
        )
        self._lane = self._tracer.lane(role="engine", name=self._name)
        if publishes_adapters(config):
            self._layout = adapter_layout(config)
        else:
            model = skeleton(policy_source(config))
            # A server knows weights by the names that files have, not by those of this model.
            published = export_names(model).publish(model.named_parameters())
            self._layout = WeightLayout.of(published)
        if config.engine.urls:
            self._supervisor = ExternalServer(
                external_server(config, index=self._index),
                hang_timeout_s=config.engine.hang_timeout_s,
                on_change=self._news.set,
            )
        else:
            self._supervisor = EngineSupervisor(
                server_settings(config, name=self._name, folder=self._folder, host=host),
                hang_timeout_s=config.engine.hang_timeout_s,
                on_change=self._news.set,
            )
        self._running = asyncio.create_task(self._supervisor.run())
        await self._supervisor.wait_healthy(timeout_s=config.engine.start_timeout_s)
        served = served_adapters(config)
        if served is not None and isinstance(self._supervisor, ExternalServer):
            problem = adapter_problem(self._supervisor.info, served)
            if problem is not None:
                raise RuntimeError(f"engine.urls: {config.engine.urls[self._index]}: {problem}")
        return {"pid": os.getpid(), "host": socket.gethostname()}

    async def connect(self, address: Address) -> None:
        """Make the receiver's end of a new pair; versions loaded before count for nothing.

        A server that went down since it was reported is left alone: the next report says so.
        """
        from skyrl_async.weight_sync.receiver import WeightReceiver
        from skyrl_async.weight_sync.receiving import receiving_end
        from skyrl_async.weight_sync.sglang_control import SglangControl
        from skyrl_async.weight_sync.sglang_loader import SglangLoader

        await self._disconnect()
        status = self._supervisor.status
        server = status.server
        if server is None:
            return
        engine = self._config.engine
        self._control = SglangControl(url=server.url, admin_key=server.admin_key)
        if publishes_adapters(self._config):
            self._loader = adapter_loader(self._config, self._control)
        else:
            self._loader = SglangLoader(
                self._control,
                kv_after_swap=engine.kv_after_swap,
                way="file" if engine.weight_load == "file" else "memory",
                tensor_parallel=engine.tensor_parallel,
            )
        loop = asyncio.get_running_loop()
        incarnation = status.incarnation

        def load(weights: Mapping[str, Any], policy_version: int) -> None:
            loading = self._load(weights, policy_version, incarnation)
            asyncio.run_coroutine_threadsafe(loading, loop).result(self._load_timeout_s + 5)

        def ended(_: BaseException) -> None:
            loop.call_soon_threadsafe(self._news.set)

        self._transport = receiving_end(
            address, expected=self._layout, policy_version=-1, shared=True
        )
        self._receiver = WeightReceiver(self._transport, load, on_end=ended)

    async def poll(self, *, wait_s: float) -> EngineReport:
        """Return how the engine is, at the latest after ``wait_s``, sooner when that changed.

        Raises:
            RuntimeError: if the server failed to start too often, with the last lines of its log.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        self._news.clear()
        if self._running is not None and self._running.done():
            self._running.result()
        return self._report()

    async def pin(self) -> EngineReport:
        """Finish a load in progress and end the pair, so that the weights stay as they are."""
        self._policy_version = await self._disconnect()
        return self._report()

    async def close(self) -> None:
        """Stop receiving, and the server if it is ours."""
        await self._disconnect()
        if self._running is not None:
            await self._supervisor.close()
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._tracer.close()

    async def _disconnect(self) -> int:
        """End the pair; return the version that the server runs then, -1 for none."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            await asyncio.to_thread(receiver.close)
        # A load in progress must be able to resume its server.
        async with self._loading:
            control, self._control = self._control, None
            if control is not None:
                await control.close()
            version, self._policy_version = self._policy_version, -1
        return version

    async def _load(
        self, weights: Mapping[str, Any], policy_version: int, incarnation: int
    ) -> None:
        from skyrl_async.weight_sync.sglang_direct import DirectReceiver
        from skyrl_async.weight_sync.sglang_loader import EngineBroken

        timeout_s = self._load_timeout_s
        started_s = time.monotonic()
        async with self._loading:
            status = self._supervisor.status
            if status.incarnation != incarnation or status.server is None:
                raise RuntimeError("the server is not the one that the pair was made for")
            try:
                with self._supervisor.expect_silence(timeout_s):
                    if isinstance(self._transport, DirectReceiver):
                        report = await self._transport.pull(self._control, self._loader)
                    else:
                        report = await self._loader.load(
                            weights, policy_version=policy_version, timeout_s=timeout_s
                        )
            except EngineBroken as error:
                # Its weights are of no version, so nothing that it samples may be used.
                self._policy_version = -1
                self._detail = str(error)
                self._supervisor.restart(str(error))
                raise
            self._loaded(report, started_s)

    @property
    def _load_timeout_s(self) -> float:
        """How long one load may take; a direct one includes the transfer."""
        config = self._config
        if config.engine.weight_load == "direct":
            return max(config.engine.load_timeout_s, config.weight_sync.timeout_s)
        return config.engine.load_timeout_s

    def _loaded(self, report: LoadReport, started_s: float) -> None:
        ended_s, version = time.monotonic(), report.policy_version
        swap_s = max(started_s, ended_s - report.stall_s)
        self._lane.span("load", started_s, ended_s, {"policy_version": version})
        self._lane.span("swap", swap_s, ended_s, {"policy_version": version})
        self._lane.flow("loaded", policy_version=version, time_s=ended_s)
        self._policy_version = report.policy_version
        self._stall_s += report.stall_s
        self._loads += 1
        self._news.set()

    def _report(self) -> EngineReport:
        status = self._supervisor.status
        server = status.server
        stall_s, self._stall_s = self._stall_s, 0.0
        loads, self._loads = self._loads, 0
        restarts = status.incarnation - self._reported_incarnation
        self._reported_incarnation = status.incarnation
        endpoint = None
        if server is not None:
            endpoint = EngineEndpoint(
                engine_id=self._name,
                url=server.url,
                api_key=server.api_key,
                policy_version=max(0, self._policy_version),
            )
        return EngineReport(
            endpoint=endpoint,
            incarnation=status.incarnation,
            connected=self._connected(),
            policy_version=self._policy_version,
            counts={"stall_s": stall_s, "loads": loads, "restarts": max(0, restarts)},
            detail=self._detail or status.detail,
            named=publishes_adapters(self._config),
        )

    def _connected(self) -> bool:
        if self._receiver is None:
            return False
        try:
            self._receiver.check()
        except RuntimeError:
            return False
        return True
