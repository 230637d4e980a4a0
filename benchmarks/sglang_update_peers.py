"""The processes around a server that gets new weights, and the requests that keep it busy."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import random
import statistics
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import torch

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.engine_process import RunningServer
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.receiving import receiving_end
from skyrl_async.weight_sync.sglang_control import SglangControl
from skyrl_async.weight_sync.sglang_direct import DirectReceiver
from skyrl_async.weight_sync.sglang_loader import LoadReport, SglangLoader
from skyrl_async.weight_sync.snapshot import SnapshotPool

WAYS = ("direct", "memory", "file")
KV = ("recompute", "keep")
WAIT_S = 120.0

NUM_BESIDE, PROMPT_TOKENS, CONTEXT_LENGTH = 3, 8, 256
BESIDE_TOKENS = (32, 96)
"""Fewest and most of a reply of the requests beside the probe."""
PROBE_TOKENS = 128
USUAL_GAPS = 50
SETTLE_TOKENS = 10
MIN_BUCKETS = 8
"""Throttling holds back the bucket that follows, so a single one would travel at full speed."""


def learn(pipe: Connection, shape: Mapping[str, int]) -> None:
    """Make senders and publish through them, as the messages say."""
    torch.set_num_threads(1)
    model = build_tiny_model(**shape).requires_grad_(False)
    pool = SnapshotPool(model.named_parameters(), num_buffers=1)
    store = host_store()
    senders: dict[str, Any] = {}
    pipe.send(pool.layout)
    while message := pipe.recv():
        if message[0] == "open":
            _, pair, kind, max_bytes_per_s = message
            senders[pair] = kind(
                "engine",
                store=store,
                bucket_bytes=min(8 << 20, pool.layout.size_bytes // MIN_BUCKETS),
                max_bytes_per_s=max_bytes_per_s,
            )
            pipe.send(senders[pair].address)
            continue
        _, pair, version = message
        for parameter in model.parameters():
            parameter.mul_(0.9999)
        before_s = time.process_time()
        snapshot = pool.take(version)
        report = senders[pair].send(snapshot, deadline=time.monotonic() + WAIT_S)
        snapshot.release()
        pipe.send((report.transfer_s, time.process_time() - before_s))
    for sender in senders.values():
        sender.close()


class Worker:
    """Beside a server: receives versions and loads them in the way that was chosen last.

    Args:
        layout: of the weights.
        url: of the server; None loads nothing.
        admin_key: of the server.
    """

    def __init__(self, layout: WeightLayout, url: str | None, admin_key: str | None) -> None:
        self._layout = layout
        self._loads = url is not None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._control = SglangControl(url=url or "", admin_key=admin_key)
        self._loader: SglangLoader
        self._receivers: list[WeightReceiver] = []
        self.loaded: tuple[LoadReport, float] | None = None

    def open(self, address: Any) -> None:
        """Connect to a sender."""
        transport = receiving_end(address, expected=self._layout, policy_version=-1, shared=True)

        def load(weights: Mapping[str, torch.Tensor], policy_version: int) -> None:
            if not self._loads:
                return
            if isinstance(transport, DirectReceiver):
                loading = transport.pull(self._control, self._loader)
            else:
                loading = self._loader.load(
                    weights, policy_version=policy_version, timeout_s=WAIT_S
                )
            report = asyncio.run_coroutine_threadsafe(loading, self._loop).result(WAIT_S)
            self.loaded = (report, time.monotonic())

        self._receivers.append(WeightReceiver(transport, load))

    def choose(self, way: Any, kv_after_swap: Any) -> None:
        """Load the next versions so."""
        self._loader = SglangLoader(
            self._control,
            kv_after_swap=kv_after_swap,
            way="file" if way == "file" else "memory",
        )

    def close(self) -> None:
        """End all pairs."""
        for receiver in self._receivers:
            receiver.close()
        asyncio.run_coroutine_threadsafe(self._control.close(), self._loop).result(WAIT_S)


def work(pipe: Connection) -> None:
    """Do what the messages say to the worker; answer with what it loaded last, and CPU seconds."""
    torch.set_num_threads(1)
    worker = Worker(*pipe.recv())
    while message := pipe.recv():
        command, *arguments = message
        if command != "report":
            getattr(worker, command)(*arguments)
        pipe.send((worker.loaded, time.process_time()))
    worker.close()


class Peer:
    """A process at the other end of a pipe, and its answers, each within a deadline."""

    def __init__(self, target: Any, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, *message: object) -> None:
        """Send something that has no answer."""
        self._pipe.send(message)

    async def told(self) -> Any:
        """Return the next answer."""
        return await asyncio.to_thread(self._told)

    async def ask(self, *message: object) -> Any:
        """Send a message and return the answer."""
        self.tell(*message)
        return await self.told()

    def end(self) -> None:
        """Let the process end, or kill it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.kill()

    def _told(self) -> Any:
        if not self._pipe.poll(WAIT_S):
            raise RuntimeError(f"a process said nothing for {WAIT_S:.0f} s")
        return self._pipe.recv()


@dataclass(slots=True)
class Traffic:
    """Requests that keep a server busy; one of them, the probe, has every token's arrival noted.

    Attributes:
        arrivals: of the tokens of each probe, in turn.
        recomputed: by version, context tokens of running requests when it was loaded.
    """

    server: RunningServer
    arrivals: list[list[float]] = field(default_factory=list)
    recomputed: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def run(self) -> None:
        """Generate until cancelled."""
        headers = {"Authorization": f"Bearer {self.server.api_key}"}
        async with (
            aiohttp.ClientSession(headers=headers, read_bufsize=1 << 20) as session,
            asyncio.TaskGroup() as group,
        ):
            for seed in range(NUM_BESIDE):
                group.create_task(self._beside(session, random.Random(seed)))
            group.create_task(self._probe(session, random.Random(-1)))

    async def _beside(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while True:
            body = make_body(rng, rng.randint(*BESIDE_TOKENS))
            async with session.post(f"{self.server.url}/generate", json=body) as reply:
                self._note((await reply.json())["meta_info"])

    async def _probe(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while True:
            body = make_body(rng, PROBE_TOKENS, stream=True)
            arrivals: list[float] = []
            self.arrivals.append(arrivals)
            async with session.post(f"{self.server.url}/generate", json=body) as reply:
                last = b"{}"
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        arrivals.append(time.monotonic())
                        last = line
            self._note(json.loads(last.removeprefix(b"data: "))["meta_info"])

    def _note(self, meta_info: Mapping[str, Any]) -> None:
        for span in meta_info["weight_versions"][1:]:
            self.recomputed[span["version"]] += meta_info["prompt_tokens"] + span["start"]

    def usual_gap_s(self) -> float:
        """Return the median of the last gaps between tokens of the probe."""
        gaps = [b - a for times in self.arrivals[-8:] for a, b in itertools.pairwise(times)]
        return statistics.median(gaps[-USUAL_GAPS:])

    def seen_gap_s(self, paused: float, resumed: float) -> float | None:
        """Return the longest gap that overlaps a pause; None if no probe was running at its start.

        A gap also overlaps when the tokens after it needed their context computed again.
        """
        gaps = self._gaps()
        if not any(before <= paused < after for before, after in gaps):
            return None
        return max(after - before for before, after in gaps if before <= resumed and after > paused)

    def gap_within_s(self, start: float, end: float) -> float:
        """Return the longest gap between tokens that all came between two times, or 0."""
        inside = (b - a for a, b in self._gaps() if a >= start and b <= end)
        return max(inside, default=0.0)

    def _gaps(self) -> list[tuple[float, float]]:
        return [gap for times in self.arrivals[-64:] for gap in itertools.pairwise(times)]

    async def settle(self, since: float) -> None:
        """Return when the probe goes on after ``since``."""
        async with asyncio.timeout(WAIT_S):
            while sum(t > since for times in self.arrivals[-4:] for t in times) < SETTLE_TOKENS:
                await asyncio.sleep(0.01)


def make_body(rng: random.Random, max_tokens: int, *, stream: bool = False) -> dict[str, Any]:
    return {
        "rid": uuid.uuid4().hex,
        "input_ids": rng.choices(range(64), k=PROMPT_TOKENS),
        "sampling_params": {
            "max_new_tokens": max_tokens,
            "ignore_eos": True,
            "stream_interval": 1,
        },
        "return_logprob": True,
        "stream": stream,
        # Nothing is shared, so that no prefix is found in the cache.
        "extra_key": uuid.uuid4().hex,
    }
