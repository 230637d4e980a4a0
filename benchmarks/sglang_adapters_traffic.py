"""The requests that run while ``sglang_adapters.py`` loads versions, and what they see of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import torch

from skyrl_async.rollout.engine_process import RunningServer
from skyrl_async.rollout.sglang_protocol import adapter_name, new_rid

Load = Callable[[int], Awaitable[float]]
"""Loads a version, and returns how long the calls took that can stop the server."""

NUM_REQUESTS, CONTEXT_TOKENS, REPLY_TOKENS, CONTEXT_LENGTH = 8, 64, 400, 512
_RETRY_S = 0.002
_AFTERWARDS_S = 0.5
_SETTLE_TIMEOUT_S = 30.0


class Request:
    """One request after another, token by token.

    Attributes:
        times_s: when each token came; None where another reply begins.
        adapter: that the next request names, if any.
    """

    def __init__(self, server: RunningServer, session: aiohttp.ClientSession, seed: int) -> None:
        self._url, self._session = f"{server.url}/generate", session
        self._seeds = itertools.count(1000 * seed)
        self.times_s: list[float | None] = []
        self.adapter: str | None = None

    async def run(self) -> None:
        """Generate until cancelled; a reply that the server ends early goes on from its tokens."""
        while True:
            generator = torch.Generator().manual_seed(next(self._seeds))
            ids = torch.randint(5, 60, (CONTEXT_TOKENS,), generator=generator).tolist()
            self.times_s.append(None)
            while len(ids) < CONTEXT_TOKENS + REPLY_TOKENS:
                ids = await self._reply(ids)

    async def _reply(self, ids: list[int]) -> list[int]:
        body: dict[str, Any] = {
            "rid": new_rid(),
            "input_ids": ids,
            "sampling_params": {
                "max_new_tokens": CONTEXT_TOKENS + REPLY_TOKENS - len(ids),
                "ignore_eos": True,
                "stream_interval": 1,
            },
            "stream": True,
            # Merged weights of all versions would share cached prefixes.
            "extra_key": self.adapter or new_rid(),
        }
        if self.adapter is not None:
            body["lora_path"] = self.adapter
        whole = list(ids)
        async with self._session.post(self._url, json=body) as response:
            if response.status == 400 and "LoRA adapter" in (text := await response.text()):
                await asyncio.sleep(_RETRY_S)  # It is being loaded.
                return whole
            if response.status != 200:
                raise RuntimeError(text if response.status == 400 else await response.text())
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line.removeprefix(b"data: "))
                    total = len(ids) + chunk["meta_info"]["completion_tokens"]
                    new = chunk["output_ids"][len(whole) - total :] if total > len(whole) else []
                    whole += new
                    self.times_s += [time.monotonic()] * len(new)
        return whole

    def came_after(self, time_s: float) -> bool:
        """Return whether two tokens came after a time."""
        return all(t is not None and t > time_s for t in self.times_s[-2:])

    def longest_gap_s(self, start_s: float, end_s: float) -> float | None:
        """Return the longest gap that overlaps a time; None if no reply ran through it."""
        gaps = [
            b - a
            for a, b in itertools.pairwise(self.times_s)
            if a is not None and b is not None and b >= start_s and a <= end_s
        ]
        return max(gaps, default=None)


async def measure(
    server: RunningServer, load: Load, versions: Sequence[int], *, adapters: bool
) -> dict[str, float]:
    """Load each version while requests run; return medians."""
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with aiohttp.ClientSession(headers=headers, read_bufsize=1 << 20) as session:
        requests = [Request(server, session, seed) for seed in range(NUM_REQUESTS)]
        if adapters:
            await load(versions[0])
            for request in requests:
                request.adapter = adapter_name(versions[0])
        tasks = [asyncio.create_task(request.run()) for request in requests]
        try:
            return await _measure_loads(requests, tasks, load, versions, adapters)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _measure_loads(
    requests: Sequence[Request],
    tasks: Sequence[asyncio.Task[None]],
    load: Load,
    versions: Sequence[int],
    adapters: bool,
) -> dict[str, float]:
    seen: list[float] = []
    reported: list[float] = []
    usual: list[float] = []
    for version in versions[1:]:
        quiet = time.monotonic()
        await asyncio.sleep(1.5)
        started = time.monotonic()
        for request in requests:
            times = [t for t in request.times_s if t is not None and quiet + 0.5 < t < started]
            usual += [b - a for a, b in itertools.pairwise(times)]
        if adapters:
            # Requests that end because of the load name the new one, as the pool lets them.
            for request in requests:
                request.adapter = adapter_name(version)
            await asyncio.sleep(0)
        reported.append(await load(version))
        # What the load began, such as the end of requests, may show a moment later.
        ended = time.monotonic() + _AFTERWARDS_S
        await asyncio.sleep(_AFTERWARDS_S)
        async with asyncio.timeout(_SETTLE_TIMEOUT_S):
            while not all(request.came_after(ended) for request in requests):
                await asyncio.sleep(0.05)
                for task in tasks:
                    if task.done():
                        task.result()
        gaps = [request.longest_gap_s(started, ended) for request in requests]
        seen += [gap for gap in gaps if gap is not None]
        for task in tasks:
            if task.done():
                task.result()
    usual_s = statistics.median(usual)
    return {
        "seen_stall_s": max(0.0, statistics.median(seen) - usual_s),
        "reported_stall_s": statistics.median(reported),
        "usual_gap_s": usual_s,
        "tokens_per_s": NUM_REQUESTS / statistics.mean(usual),
    }
