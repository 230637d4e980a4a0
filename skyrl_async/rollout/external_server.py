"""A server that somebody else runs: watched like our own, but neither started nor stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

State = Literal["starting", "healthy", "down"]

_PROBE_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalAddress:
    """Where the server is, with its keys.

    Attributes:
        url: ``http://HOST:PORT``.
        api_key: allows generation; None if the server asks for none.
        admin_key: allows weight updates; None if the server asks for none.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalStatus:
    """How the server is; see :class:`skyrl_async.rollout.engine_supervisor.EngineStatus`."""

    state: State
    incarnation: int = 0
    server: ExternalAddress | None = None
    detail: str = ""


class ExternalServer:
    """Probes a server; the counterpart of :class:`EngineSupervisor` for ``engine.urls``.

    A server that answers again after it did not is a new incarnation: nobody knows what it lost.

    Args:
        address: of the server.
        hang_timeout_s: without an answer for this long it counts as down.
        on_change: called whenever the status has changed.

    Attributes:
        info: what the server last said of itself.
    """

    def __init__(
        self,
        address: ExternalAddress,
        *,
        hang_timeout_s: float = 4.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._hang_timeout_s = hang_timeout_s
        self._on_change = on_change
        self._silence_until = 0.0
        self._status = ExternalStatus(state="starting", detail="not probed yet")
        self._healthy = asyncio.Event()
        self.info: Mapping[str, Any] = {}

    @property
    def status(self) -> ExternalStatus:
        """How the server is now."""
        return self._status

    async def wait_healthy(self, *, timeout_s: float) -> ExternalAddress:
        """Return when the server answers.

        Raises:
            RuntimeError: if it does not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._healthy.wait()
        except TimeoutError:
            raise RuntimeError(
                f"engine.urls: {self._address.url} did not answer within {timeout_s:g} s: "
                f"{self._status.detail}"
            ) from None
        return self._address

    async def run(self) -> None:
        """Probe until cancelled."""
        headers = {}
        if self._address.api_key:
            headers["Authorization"] = f"Bearer {self._address.api_key}"
        async with aiohttp.ClientSession(headers=headers) as session:
            while True:
                problem = await self._probe(session)
                if problem is None and self._status.state != "healthy":
                    self._set("healthy", incarnation=self._status.incarnation + 1)
                elif problem is not None and time.monotonic() > self._silence_until:
                    self._set("down", detail=problem)
                await asyncio.sleep(_PROBE_INTERVAL_S)

    async def close(self) -> None:
        """Nothing to stop: the server is not ours."""

    @contextlib.contextmanager
    def expect_silence(self, timeout_s: float) -> Iterator[None]:
        """Do not take the server for dead inside, for at most ``timeout_s``."""
        self._silence_until = time.monotonic() + timeout_s
        try:
            yield
        finally:
            self._silence_until = 0.0

    def restart(self, reason: str) -> None:
        """Count what follows as a new incarnation, whose weights are unknown until they load."""
        self._set("down", detail=reason)

    async def _probe(self, session: aiohttp.ClientSession) -> str | None:
        """Return what is wrong; the request makes a round trip through the schedulers."""
        url = f"{self._address.url}/server_info"
        limit = aiohttp.ClientTimeout(total=self._hang_timeout_s)
        try:
            async with session.get(url, timeout=limit) as response:
                if response.status != 200:
                    return f"{url} answered {response.status}"
                self.info = await response.json(content_type=None)
                return None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return f"{url}: {error!r}"

    def _set(self, state: State, *, incarnation: int | None = None, detail: str = "") -> None:
        self._status = ExternalStatus(
            state=state,
            incarnation=self._status.incarnation if incarnation is None else incarnation,
            server=self._address if state == "healthy" else None,
            detail=detail,
        )
        (self._healthy.set if state == "healthy" else self._healthy.clear)()
        self._on_change()
