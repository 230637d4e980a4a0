"""What the fake servers of this folder have in common: HTTP, the key, and faults that are scripted.

``faults`` of such a server maps an endpoint to what goes wrong at its next calls, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Self, TypeVar

from aiohttp import web

ADMIN_KEY = "only-the-worker-knows"

F = TypeVar("F")


class PostSite:
    """Answers every POST to ``url`` with one coroutine, from :meth:`open` to :meth:`close`."""

    def __init__(self, runner: web.AppRunner, url: str) -> None:
        self._runner = runner
        self.url = url

    @classmethod
    async def open(
        cls,
        answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
        *,
        max_bytes: int = 1 << 20,
    ) -> Self:
        """Listen on this machine; ``path`` in a request's ``match_info`` is the endpoint."""
        app = web.Application(client_max_size=max_bytes)
        app.router.add_post("/{path}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return cls(runner, f"http://{host}:{port}")

    async def close(self) -> None:
        await self._runner.cleanup()


def next_fault(faults: Mapping[str, deque[F]], endpoint: str) -> F | None:
    """Take the fault of the call that an endpoint just got."""
    left = faults.get(endpoint)
    return left.popleft() if left else None


def has_admin_key(request: web.Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {ADMIN_KEY}"
