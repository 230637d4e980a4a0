"""Engines that are workers of their own: who is in the training pool, and how each gets there.

An engine goes round this circle, whether the run starts, its server died, or an evaluation had it::

    out ──server is up──► connecting ──newest version verified and loaded──► in the pool
     ▲                                                                           │
     └───server died or hung, pair lost, withdrawn for an evaluation─────────────┘

Only engines in the pool are given training requests, and ``live_version`` is the smallest version
of those; so no token of weights that nobody verified enters a trajectory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from skyrl_async.coordination.deadlines import Deadline

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_EVALUATION_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What a worker beside an engine says about it.

    Attributes:
        endpoint: where the server is; None while it is down. The fleet only passes it on.
        incarnation: of the server process; a new one has lost its weights and its requests.
        connected: whether its receiver has a pair with the publisher.
        policy_version: verified and loaded since it was connected; -1 for none.
        counts: swaps, stall seconds and the like since the last report, to be summed.
        detail: why it is down, for the log.
        named: whether requests name their version, so that actors must be told of a newer one
            before anything is admitted that counts on it.
    """

    endpoint: Any | None
    incarnation: int
    connected: bool
    policy_version: int
    counts: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    named: bool = False


class EngineWorker(Protocol):
    """The worker beside one engine, wherever it runs."""

    async def poll(self, *, wait_s: float) -> EngineReport:
        """Return how the engine is, at the latest after ``wait_s``, sooner when that changed."""
        ...

    async def connect(self, address: Any) -> None:
        """Make the receiver's end of a new pair; versions loaded before count for nothing."""
        ...

    async def pin(self) -> EngineReport:
        """Finish a load in progress and end the pair, so that the weights stay as they are."""
        ...


class Publishing(Protocol):
    """The learner, as far as pairs are concerned."""

    async def open_pair(self, engine_id: str) -> Any:
        """Make a new sender for an engine, in place of an old one; return its address."""
        ...

    async def close_pair(self, engine_id: str) -> None:
        """Give up the sender of an engine, also in the middle of a transfer."""
        ...

    async def publish_newest(self) -> None:
        """Publish the present weights to the engines that do not have them."""
        ...


class PoolLedger(Protocol):
    """What admission must know about engines."""

    @property
    def live_version(self) -> int:
        """The newest version that every engine of the pool has loaded."""
        ...

    def engine_joined(self, engine_id: str, version: int) -> Any:
        """Count an engine in."""
        ...

    def engine_loaded(self, engine_id: str, version: int) -> Any:
        """Record a load."""
        ...

    def engine_left(self, engine_id: str) -> Any:
        """Count an engine out."""
        ...


@dataclass(slots=True)
class _Member:
    """What is known of one engine; ``incarnation`` is the one its pair was made for."""

    endpoint: Any | None = None
    incarnation: int = -1
    version: int = -1
    in_pool: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """How long to wait.

    Attributes:
        poll_wait_s: a worker reports at least this often.
        answer_timeout_s: a worker that does not answer a call for this long has failed.
    """

    poll_wait_s: float = 0.5
    answer_timeout_s: float = 60.0


class EngineFleet:
    """Keeps the training pool: joins, removes and withdraws engines.

    ::

        fleet = EngineFleet(workers, ledger=ledger, learner=learner, set_engines=..., ...)
        tasks = [asyncio.create_task(fleet.watch(name)) for name in fleet.names]
        result = await fleet.evaluate(play)    # play(endpoint): nothing is loaded meanwhile

    Args:
        workers: by engine id.
        ledger: of the run's groups.
        learner: opens pairs and publishes.
        set_engines: tells all rollout actors the endpoints of the pool.
        on_report: called with the id and each report.
        on_change: called after each report: slots may be free, a version may be live.
        settings: limits.
    """

    def __init__(
        self,
        workers: Mapping[str, EngineWorker],
        *,
        ledger: PoolLedger,
        learner: Publishing,
        set_engines: Callable[[Sequence[Any]], Awaitable[None]],
        on_report: Callable[[str, EngineReport], None],
        on_change: Callable[[], Awaitable[None]],
        settings: FleetSettings,
    ) -> None:
        self._workers = dict(workers)
        self._members = {name: _Member() for name in workers}
        self._ledger = ledger
        self._learner = learner
        self._set_engines = set_engines
        self._on_report = on_report
        self._on_change = on_change
        self._settings = settings
        self._joined = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        """Ids of all engines, in the pool or not."""
        return tuple(self._workers)

    @property
    def pool(self) -> tuple[str, ...]:
        """Ids of the engines that are given training requests."""
        return tuple(name for name, member in self._members.items() if member.in_pool)

    async def watch(self, name: str) -> None:
        """Take the reports of one engine, for ever.

        Raises:
            Exception: of the worker, when it gives the engine up.
        """
        settings, worker = self._settings, self._workers[name]
        while True:
            limit_s = settings.answer_timeout_s + settings.poll_wait_s
            async with Deadline(limit_s, "a report"):
                report = await worker.poll(wait_s=settings.poll_wait_s)
            self._on_report(name, report)
            await self._take(name, report)
            await self._on_change()

    async def evaluate(self, play: Callable[[Any], Awaitable[Result]]) -> Result:
        """Return ``play(endpoint)`` of a withdrawn engine; with another one if that engine dies.

        Raises:
            Exception: of the last attempt.
        """
        for attempts_left in range(_EVALUATION_ATTEMPTS - 1, -1, -1):
            try:
                async with self.withdrawn() as (endpoint, _):
                    return await play(endpoint)
            except Exception as error:
                if not attempts_left:
                    raise
                logger.warning("an evaluation failed, and is tried again: %s", error)
        raise AssertionError("unreachable")

    @contextlib.asynccontextmanager
    async def withdrawn(self) -> AsyncIterator[tuple[Any, int]]:
        """Take the engine with the newest version out of the pool; it is back after its next load.

        Yields:
            Its endpoint and the version that it is pinned to.

        Waits while no engine is in the pool.

        Raises:
            RuntimeError: if the engine died before it was pinned.
        """
        while not self.pool:
            self._joined.clear()
            await self._joined.wait()
        name = max(self.pool, key=lambda n: self._members[n].version)
        member = self._members[name]
        member.pinned = True
        try:
            await self._remove(name, "withdrawn for an evaluation")
            async with Deadline(self._settings.answer_timeout_s, f"{name} to be pinned"):
                report = await self._workers[name].pin()
            if report.endpoint is None or report.policy_version < 0:
                raise RuntimeError(f"{name} died before it was pinned: {report.detail}")
            yield report.endpoint, report.policy_version
        finally:
            member.pinned = False

    async def _take(self, name: str, report: EngineReport) -> None:
        member = self._members[name]
        if member.pinned:
            return
        usable = (
            report.endpoint is not None
            and report.connected
            and report.incarnation == member.incarnation
        )
        if member.in_pool and not usable:
            await self._remove(name, report.detail or "it lost its pair")
        elif member.in_pool:
            if report.policy_version > member.version:
                member.version = report.policy_version
                if report.named:
                    member.endpoint = report.endpoint
                    await self._tell_actors()
                    if not member.in_pool:
                        return  # Withdrawn meanwhile.
                self._ledger.engine_loaded(name, report.policy_version)
        elif usable:
            # One behind the others must not play: slots admitted since promise newer tokens.
            if report.policy_version >= self._ledger.live_version:
                await self._join(name, report)
        elif report.endpoint is not None:
            await self._connect(name, report)

    async def _connect(self, name: str, report: EngineReport) -> None:
        settings = self._settings
        logger.info("%s is up, and is given the newest weights", name)
        async with Deadline(settings.answer_timeout_s, f"the learner to open a pair with {name}"):
            address = await self._learner.open_pair(name)
        async with Deadline(settings.answer_timeout_s, f"{name} to connect"):
            await self._workers[name].connect(address)
        self._members[name].incarnation = report.incarnation
        async with Deadline(settings.answer_timeout_s, "the learner to publish"):
            await self._learner.publish_newest()

    async def _join(self, name: str, report: EngineReport) -> None:
        member = self._members[name]
        member.endpoint, member.version = report.endpoint, report.policy_version
        self._ledger.engine_joined(name, report.policy_version)
        member.in_pool = True
        self._joined.set()
        logger.info("%s joined the pool at policy version %d", name, report.policy_version)
        await self._tell_actors()

    async def _remove(self, name: str, why: str) -> None:
        member = self._members[name]
        member.in_pool = False
        member.incarnation = -1
        self._ledger.engine_left(name)
        logger.info("%s left the pool: %s", name, why)
        await self._tell_actors()
        async with Deadline(self._settings.answer_timeout_s, f"the pair with {name} to end"):
            await self._learner.close_pair(name)

    async def _tell_actors(self) -> None:
        async with Deadline(self._settings.answer_timeout_s, "the actors to take the pool"):
            await self._set_engines([self._members[name].endpoint for name in self.pool])
