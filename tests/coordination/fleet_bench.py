"""A fleet over fake engines and the real admission."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.engine_fleet import EngineFleet, EngineReport, FleetSettings

NAMES = ("engine 0", "engine 1")


DEADLINE_S = 10.0


@dataclass(frozen=True)
class Endpoint:
    """What actors are given: the server process and the weights that it had."""

    engine: str
    incarnation: int
    named_version: int | None = None


class FakeEngine:
    """A server with a worker beside it, which checks the order of what it is told."""

    def __init__(self, name: str, learner: FakePublisher) -> None:
        self.name = name
        self.incarnation = 1
        self.up = True
        self.address: int | None = None
        self.version = -1
        self.named = False
        self.news = asyncio.Event()
        self._learner = learner

    async def poll(self, *, wait_s: float) -> EngineReport:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self.news.wait()
        self.news.clear()
        return self.report()

    async def connect(self, address: Any) -> None:
        assert self._learner.pairs[self.name] == address, "an address is used while it is new"
        self.version, self.address = -1, address
        self.news.set()

    async def pin(self) -> EngineReport:
        version = self.version
        self.address = None
        report = self.report()
        assert report.policy_version == version
        return report

    def report(self) -> EngineReport:
        connected = self.address is not None and self._learner.pairs.get(self.name) == self.address
        named_version = self.version if self.named else None
        return EngineReport(
            endpoint=Endpoint(self.name, self.incarnation, named_version) if self.up else None,
            incarnation=self.incarnation,
            connected=connected,
            policy_version=self.version,
            detail="" if self.up else "killed",
            named=self.named,
        )

    def die(self) -> None:
        self.up, self.version, self.address = False, -1, None
        self.news.set()

    def come_back(self) -> None:
        if not self.up:
            self.up = True
            self.incarnation += 1
            self.news.set()

    def load(self) -> None:
        """Load the newest version, if a pair and a server are there."""
        connected = self.address is not None and self._learner.pairs.get(self.name) == self.address
        if self.up and connected and self._learner.published > self.version:
            self.version = self._learner.published
            self.news.set()


class FakePublisher:
    """Opens pairs, and counts versions."""

    def __init__(self) -> None:
        self.version = 0
        self.published = -1
        self.pairs: dict[str, int] = {}
        self._next = 0

    async def open_pair(self, engine_id: str) -> int:
        self._next += 1
        self.pairs[engine_id] = self._next
        return self._next

    async def close_pair(self, engine_id: str) -> None:
        self.pairs.pop(engine_id, None)

    async def publish_newest(self) -> None:
        self.published = self.version

    def step(self) -> None:
        self.version += 1
        self.published = self.version


class Bench:
    """A fleet over fakes and the real admission."""

    def __init__(self) -> None:
        self.learner = FakePublisher()
        self.engines = {name: FakeEngine(name, self.learner) for name in NAMES}
        self.admission = Admission(
            groups_per_step=4, max_staleness=3, largest_group_bytes=10, capacity_bytes=10_000
        )
        self.pools: list[tuple[Endpoint, ...]] = []
        self.live_when_told: list[int] = []
        self.while_told = lambda: None
        self.fleet = EngineFleet(
            self.engines,
            ledger=self.admission,
            learner=self.learner,
            set_engines=self._set_engines,
            on_report=lambda name, report: None,
            on_change=self._changed,
            settings=FleetSettings(poll_wait_s=0.01, answer_timeout_s=5.0),
        )
        self._reports = asyncio.Event()

    async def _set_engines(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            engine = self.engines[endpoint.engine]
            if engine.up and engine.incarnation == endpoint.incarnation and engine.address:
                assert engine.version >= 0, "actors are given an engine with unverified weights"
        self.pools.append(tuple(endpoints))
        self.live_when_told.append(self.admission.live_version)
        self.while_told()
        await asyncio.sleep(0)

    async def _changed(self) -> None:
        self._reports.set()

    @contextlib.asynccontextmanager
    async def running(self):
        watching = [asyncio.create_task(self.fleet.watch(name)) for name in NAMES]
        try:
            async with asyncio.timeout(DEADLINE_S):
                yield
        finally:
            for task in watching:
                task.cancel()
            results = await asyncio.gather(*watching, return_exceptions=True)
            for result in results:
                if not isinstance(result, asyncio.CancelledError):
                    raise result

    async def until(self, condition) -> None:
        while not condition():
            self._reports.clear()
            await self._reports.wait()

    async def until_all_play(self) -> None:
        """Let every engine come back and load; return when all are in the pool."""
        for engine in self.engines.values():
            engine.come_back()

        def all_play() -> bool:
            for engine in self.engines.values():
                engine.load()
            return set(self.fleet.pool) == set(NAMES)

        await self.until(all_play)


def bench_test(body):
    """Run a coroutine with a fleet that watches both engines."""

    def run():
        async def main():
            bench = Bench()
            async with bench.running():
                await body(bench)

        asyncio.run(main())

    run.__name__ = body.__name__
    return run
