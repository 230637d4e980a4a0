"""The live page of a run, and its metrics for Prometheus, over HTTP on this machine.

Nothing but three fixed paths is served, and no path is ever taken from a request. The ``Host`` of
every request must be an address or this machine's name, so that a page elsewhere cannot read the
run by giving its own name the address of this machine (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from skyrl_async.report.content import Known, RunContent
from skyrl_async.report.page import render
from skyrl_async.report.run_files import is_run

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
_POLL_INTERVAL_S = 10.0
_NO_STORE = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_Made = TypeVar("_Made")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ReportServer:
    """Serves ``/`` (the page), ``/data`` (news for it) and ``/metrics``, from a thread of its own.

    ::

        server = ReportServer(Path("runs/number_guess-20260101-120000"))
        print(server.start())
        ...
        server.close()

    The run's files are read when somebody asks, and now and then, no more than was added since.

    Args:
        folder: of the run.
        host: address to listen on; anyone who reaches it can read the run.
        port: to listen on; 0 takes a free one.

    Raises:
        ValueError: if the folder holds no run.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        if not is_run(folder):
            raise ValueError(f"{folder}: holds no run (config.yaml, metrics.jsonl)")
        self._content = RunContent(folder.resolve())
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="live page", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._reading: asyncio.Lock | None = None
        self._error: OSError | None = None
        self._url = ""

    def start(self) -> str:
        """Begin to serve; return the address of the page.

        Raises:
            OSError: if the address cannot be listened on.
            TimeoutError: if that takes too long.
        """
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the live page did not start within {START_TIMEOUT_S:g} s")
        if self._error is not None:
            raise self._error
        return self._url

    def close(self) -> None:
        """Stop serving; may be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_TIMEOUT_S)

    def join(self) -> None:
        """Return when the server has stopped."""
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        except OSError as error:
            self._error = error
        finally:
            self._loop.close()
            self._ready.set()

    async def _run(self) -> None:
        self._reading = asyncio.Lock()
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            host, port = runner.addresses[0][:2]
            shown = socket.gethostname() if _is_unspecified(host) else host
            self._url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
            self._ready.set()
            while not self._stop.is_set():
                # So that a page that is opened late does not wait for the whole run to be read.
                await self._in_thread(self._content.poll)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _POLL_INTERVAL_S)
        finally:
            await runner.cleanup()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_guarded])
        application.router.add_get("/", self._page)
        application.router.add_get("/data", self._data)
        application.router.add_get("/metrics", self._metrics)
        return application

    async def _page(self, request: web.Request) -> web.Response:
        def make() -> str:
            return render(self._content.read(slow_parts=False), live=True)

        return web.Response(text=await self._in_thread(make), content_type="text/html")

    async def _data(self, request: web.Request) -> web.Response:
        try:
            known = Known(**{name: int(value) for name, value in request.query.items()})
        except (TypeError, ValueError):
            names = ", ".join(Known.__slots__)
            raise web.HTTPBadRequest(text=f"the query takes whole numbers for {names}") from None

        def make() -> str:
            return json.dumps(self._content.read(known), allow_nan=False, separators=(",", ":"))

        return web.Response(text=await self._in_thread(make), content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            from skyrl_async.metrics.prometheus import CONTENT_TYPE, exposition
        except ImportError as error:
            raise web.HTTPNotImplemented(text=f"{error}; pip install skyrl_async[obs]") from None

        def make() -> bytes:
            metrics, histograms, written_s = self._content.newest()
            return exposition(metrics, histograms, last_step_unix_s=written_s)

        body = await self._in_thread(make)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _in_thread(self, make: Callable[[], _Made]) -> _Made:
        """Call ``make`` beside the loop, one call at a time."""
        assert self._reading is not None, "requests come after the start"
        async with self._reading:
            return await asyncio.to_thread(make)


def open_server(
    folder: Path, *, host: str, port: int, announce: Callable[[str], None]
) -> ReportServer | None:
    """Serve the page of a run that begins; without it, the run goes on.

    Args:
        folder: of the run.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        announce: is told where the page is, or why there is none.
    """
    server = ReportServer(folder, host=host, port=port)
    try:
        address = server.start()
    except OSError as error:
        announce(f"no live page: {host}:{port} cannot be listened on ({error})")
        logger.warning("no live page at %s:%d: %s", host, port, error)
        return None
    announce(f"live page    {address}")
    logger.info("live page at %s", address)
    return server


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse foreign hosts; let nobody keep, frame or embed an answer."""
    if not allowed_host(request.headers.get("Host", "")):
        raise web.HTTPForbidden(text="this host is not served; use an address or localhost")
    answer = await handler(request)
    answer.headers.update(_NO_STORE)
    return answer


def allowed_host(header: str) -> bool:
    """Tell whether a ``Host`` header is an address, ``localhost`` or this machine's name."""
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", socket.gethostname().lower())
    return True


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
