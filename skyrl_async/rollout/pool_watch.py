"""Looks at the engines of a pool, each every second or so, from its coming to its leaving."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from skyrl_async.rollout.engine_errors import EngineError, EngineHangs, UnsupportedServer
from skyrl_async.rollout.engine_routing import Member

_MISSES = 2
"""A busy server may be late once; one that does not answer this often in a row hangs."""


class PoolWatch:
    """Finds out which members of a pool are fit for use, what they have loaded, and how busy.

    ::

        watch = PoolWatch(...)
        runner = asyncio.create_task(watch.run())
        watch.add(member)                 # until member.removed is set

    Args:
        poll_interval_s: between two looks at a member.
        on_look: called after each.
        on_failure: called with a member that does not answer as it should, and why.
    """

    def __init__(
        self,
        *,
        poll_interval_s: float,
        on_look: Callable[[], None],
        on_failure: Callable[[Member, EngineError], None],
    ) -> None:
        self._poll_interval_s = poll_interval_s
        self._on_look = on_look
        self._on_failure = on_failure
        self._added = asyncio.Event()
        self._unwatched: list[Member] = []

    def add(self, member: Member) -> None:
        """Look at a member from now on; its connections are closed when it has left the pool."""
        self._unwatched.append(member)
        self._added.set()

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            UnsupportedServer: if a server is too old.
        """
        try:
            async with asyncio.TaskGroup() as watchers:
                while True:
                    self._added.clear()
                    members, self._unwatched = self._unwatched, []
                    for member in members:
                        watchers.create_task(self._watch(member))
                    await self._added.wait()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _watch(self, member: Member) -> None:
        try:
            while not member.removed.is_set():
                await self._look_at(member)
                self._on_look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_interval_s):
                        await member.removed.wait()
            await asyncio.gather(*member.aborts, return_exceptions=True)
        finally:
            await member.client.close()

    async def _look_at(self, member: Member) -> None:
        """Ask an engine how it is.

        Raises:
            UnsupportedServer: if it is too old.
        """
        client = member.client
        try:
            if not member.greeted:
                await client.server_info()
            elif member.failure is not None:
                await client.check_generates()
            await client.reported_version()
            member.observe(await client.loads())
        except EngineError as error:
            if isinstance(error, UnsupportedServer):
                raise
            member.misses += 1
            if member.misses >= _MISSES or not isinstance(error, EngineHangs):
                self._on_failure(member, error)
        else:
            member.greeted, member.failure, member.misses = True, None, 0
