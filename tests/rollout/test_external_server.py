import asyncio
import contextlib

import pytest
from aiohttp import web

from skyrl_async.rollout import external_server
from skyrl_async.rollout.external_server import ExternalAddress, ExternalServer

SOON_S = 10.0


@pytest.fixture(autouse=True)
def probed_often(monkeypatch):
    monkeypatch.setattr(external_server, "_PROBE_INTERVAL_S", 0.05)


class Answering:
    """A server whose answers a test switches."""

    def __init__(self) -> None:
        self.status = 200
        self.hangs = False
        self.keys: list[str | None] = []

    async def info(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        if self.hangs:
            await asyncio.Event().wait()
        return web.json_response({}, status=self.status)


@contextlib.asynccontextmanager
async def watched(**options):
    """Yield what answers, what watches it, and an event of its changes."""
    answering, changed = Answering(), asyncio.Event()
    application = web.Application()
    application.router.add_get("/server_info", answering.info)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    external = ExternalServer(
        ExternalAddress(url=f"http://127.0.0.1:{port}", api_key="key-one", admin_key="key-two"),
        on_change=changed.set,
        **options,
    )
    watching = asyncio.create_task(external.run())
    try:
        async with asyncio.timeout(SOON_S):
            yield answering, external, changed
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runner.cleanup()


async def until(external: ExternalServer, changed: asyncio.Event, state: str) -> None:
    while external.status.state != state:
        changed.clear()
        await changed.wait()


def test_a_server_that_answers_with_its_key_is_healthy():
    async def body():
        async with watched() as (answering, external, _):
            address = await external.wait_healthy(timeout_s=SOON_S)
            assert external.status.server == address and external.status.incarnation == 1
            assert set(answering.keys) == {"Bearer key-one"}
            assert "key-" not in repr(address)

    asyncio.run(body())


def test_a_server_that_comes_back_is_another_incarnation():
    async def body():
        async with watched(hang_timeout_s=0.2) as (answering, external, changed):
            await until(external, changed, "healthy")
            answering.hangs = True
            await until(external, changed, "down")
            assert external.status.server is None and "/server_info" in external.status.detail
            answering.hangs = False
            await until(external, changed, "healthy")
            assert external.status.incarnation == 2

    asyncio.run(body())


def test_a_refusal_is_told():
    async def body():
        async with watched() as (answering, external, changed):
            answering.status = 401
            await until(external, changed, "down")
            assert "answered 401" in external.status.detail

    asyncio.run(body())


def test_restart_makes_its_weights_unknown():
    async def body():
        async with watched() as (_, external, changed):
            await until(external, changed, "healthy")
            external.restart("a load failed half way")
            assert external.status.state == "down"
            assert external.status.detail == "a load failed half way"
            await until(external, changed, "healthy")
            assert external.status.incarnation == 2

    asyncio.run(body())


def test_silence_is_no_death_while_it_is_expected():
    async def body():
        async with watched(hang_timeout_s=0.1) as (answering, external, changed):
            await until(external, changed, "healthy")
            with external.expect_silence(SOON_S):
                answering.hangs = True
                asked = len(answering.keys)
                while len(answering.keys) < asked + 2:
                    await asyncio.sleep(0.01)
                assert external.status.state == "healthy"
            await until(external, changed, "down")

    asyncio.run(body())
