"""How long does a new policy version stop a real SGLang server that is decoding?

Three ways of bringing it in, in turns: ``direct`` pauses the server and broadcasts over the network
into it, ``memory`` and ``file`` stage the bytes beside the server while it decodes, and stop it for
a copy within the machine. Learner, worker and server are processes of their own, as in a run; the
server has a core to itself, all others share the rest.

The network's rate is that of a collective between learner and worker over loopback; the slower ones
are throttled at the sender. A stall is measured twice: from the call that pauses the server to the
end of the one that resumes it (``reported``), and as a request sees it (``seen``): the longest gap
between two of its tokens, of which one came before the pause, minus the usual gap. Under
``recompute`` a request also sees how its context is computed again, which costs the same whichever
way the weights came, so it is counted apart; the figures of a way alone are those under ``keep``.

    python benchmarks/sglang_update.py --quick --sglang-python .sglang/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from report import finish
from sglang_serving import parse_sglang_args, serving
from sglang_update_peers import (
    CONTEXT_LENGTH,
    KV,
    NUM_BESIDE,
    WAYS,
    Peer,
    Traffic,
    learn,
    work,
)

from skyrl_async.rollout.engine_process import RunningServer
from skyrl_async.weight_sync.collective import CollectiveSender
from skyrl_async.weight_sync.sglang_direct import DirectSender

Cell = tuple[str, str, str]
"""Rate, way and treatment of the KV."""

STAGED_GROWTH_TARGET = 1.20
FULL_RATE_RATIO_TARGET = 0.5

SHAPES: Mapping[str, Mapping[str, int]] = {
    "1.5": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 320},
    "50": {"hidden_size": 448, "num_layers": 7, "num_heads": 8},
    "500": {"hidden_size": 1024, "num_layers": 13, "num_heads": 16},
}
"""Of the built-in policy, by megabytes in float32."""
RATES = {"full": 1, "1/4": 4, "1/16": 16}
"""What the loopback rate is divided by."""
REPEATS = {"1.5": 5, "50": 5, "500": 3}


class Bench:
    """One server with one size of weights, and everything around it."""

    def __init__(self, server: RunningServer, learner: Peer, worker: Peer) -> None:
        self._learner, self._worker = learner, worker
        self._traffic = Traffic(server)
        self._version = 0

    async def measure(
        self, loopback: float, cells: Sequence[Cell], repeats: int
    ) -> list[dict[str, Any]]:
        """Return the median row of every rate, way and treatment of the KV."""
        rates = list(dict.fromkeys(rate for rate, _, _ in cells))
        for rate in rates:
            limit = None if rate == "full" else loopback / RATES[rate]
            await open_pair(self._learner, self._worker, f"direct {rate}", DirectSender, limit)
            await open_pair(self._learner, self._worker, f"staged {rate}", CollectiveSender, limit)
        samples: dict[Cell, list[dict[str, float]]] = defaultdict(list)
        traffic = asyncio.create_task(self._traffic.run())
        try:
            await self._traffic.settle(time.monotonic())
            for rate in rates:  # Makes the groups and the buffers.
                for way in WAYS:
                    await self._publish(rate, way, "recompute")
            for _ in range(repeats):
                for cell in cells:
                    samples[cell].append(await self._publish(*cell))
            await asyncio.sleep(0)
            if traffic.done():
                traffic.result()
        finally:
            traffic.cancel()
            await asyncio.gather(traffic, return_exceptions=True)
        return [self._row(cell, samples[cell]) for cell in cells]

    async def _publish(self, rate: str, way: str, kv: str) -> dict[str, float]:
        """Publish until a probe was running when the server was paused."""
        traffic = self._traffic
        for _ in range(5):
            self._version += 1
            usual_s = traffic.usual_gap_s()
            _, worker_cpu_s = await self._worker.ask("choose", way, kv)
            pair = f"{'direct' if way == 'direct' else 'staged'} {rate}"
            started = time.monotonic()
            transfer_s, cpu_s = await self._learner.ask("publish", pair, self._version)
            (report, ended), worker_cpu_after_s = await self._worker.ask("report")
            if report.policy_version != self._version:
                raise RuntimeError(f"version {report.policy_version} instead of {self._version}")
            await traffic.settle(ended)
            paused = ended - report.stall_s
            seen_s = traffic.seen_gap_s(paused, ended)
            if seen_s is None:
                continue
            return {
                "version": self._version,
                "reported_stall_s": report.stall_s,
                "seen_stall_s": max(0.0, seen_s - usual_s),
                "usual_gap_s": usual_s,
                "longest_gap_before_s": traffic.gap_within_s(started, paused),
                "prepare_s": report.prepare_s,
                "transfer_s": transfer_s,
                "publish_cpu_s": cpu_s + worker_cpu_after_s - worker_cpu_s,
            }
        raise RuntimeError("no probe was running at any of five pauses")

    def _row(self, cell: Cell, samples: list[dict[str, float]]) -> dict[str, Any]:
        rate, way, kv = cell
        names = [name for name in samples[0] if name != "version"]
        row: dict[str, Any] = {"rate": rate, "way": way, "kv_after_swap": kv}
        row |= {name: statistics.median(sample[name] for sample in samples) for name in names}
        recomputed = [self._traffic.recomputed[str(sample["version"])] for sample in samples]
        row["reprefilled_tokens"] = statistics.median(recomputed) if kv == "recompute" else 0
        row["seen_stalls_s"] = [sample["seen_stall_s"] for sample in samples]
        row["reported_stalls_s"] = [sample["reported_stall_s"] for sample in samples]
        return row


async def open_pair(
    learner: Peer, worker: Peer, pair: str, kind: type, max_bytes_per_s: float | None
) -> None:
    address = await learner.ask("open", pair, kind, max_bytes_per_s)
    await worker.ask("open", address)


async def loopback_rate() -> float:
    """Return bytes per second from learner to worker, without a server."""
    learner, worker = Peer(learn, SHAPES["50"]), Peer(work)
    try:
        layout = await learner.told()
        worker.tell(layout, None, None)
        await open_pair(learner, worker, "loopback", CollectiveSender, None)
        seconds = [(await learner.ask("publish", "loopback", v))[0] for v in range(1, 8)]
    finally:
        learner.end()
        worker.end()
    return layout.size_bytes / statistics.median(seconds[1:])


def cells_of(quick: bool) -> list[Cell]:
    rates = ("full", "1/16") if quick else tuple(RATES)
    return [
        (rate, way, kv)
        for kv in KV
        for rate in (rates if kv == "keep" or not quick else ("full",))
        for way in WAYS
    ]


async def measure_size(
    size: str, loopback: float, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of one size, and SGLang's version."""
    async with serving(
        SHAPES[size],
        python=args.sglang_python,
        context_length=CONTEXT_LENGTH,
        max_running_requests=NUM_BESIDE + 1,
        max_total_tokens=4096,
        extra_args=("--incremental-streaming-output",),
    ) as server:
        # They inherit the cores that the server leaves.
        peers = learner, worker = Peer(learn, SHAPES[size]), Peer(work)
        try:
            layout = await learner.told()
            worker.tell(layout, server.url, server.admin_key)
            bench = Bench(server, learner, worker)
            rows = await bench.measure(
                loopback, cells_of(args.quick), 3 if args.quick else REPEATS[size]
            )
        finally:
            for peer in peers:
                peer.end()
    return [{"megabytes": size, **row} for row in rows], server.sglang_version


def evaluate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures: what a request sees under ``keep``, where nothing is recomputed."""
    stall_s: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    cpu_s: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["kv_after_swap"] == "keep":
            size, rate, way = row["megabytes"], row["rate"], row["way"]
            stall_s[size][rate][way] = row["seen_stall_s"]
            cpu_s[size][rate][way] = row["publish_cpu_s"]
    growth = {
        size: {way: of_rate["1/16"][way] / of_rate["full"][way] for way in WAYS}
        for size, of_rate in stall_s.items()
    }
    return {
        "stall_s": stall_s,
        "staged_growth": {s: {w: by[w] for w in ("memory", "file")} for s, by in growth.items()},
        "pause_growth": {size: by["direct"] for size, by in growth.items()},
        "full_rate_ratio": {
            size: of_rate["full"]["memory"] / of_rate["full"]["direct"]
            for size, of_rate in stall_s.items()
        },
        "publish_cpu_s": cpu_s,
    }


def find_misses(figures: Mapping[str, Any]) -> list[str]:
    misses = [
        f"staged_growth of {way} at {size} MB is {value:.2f}, above {STAGED_GROWTH_TARGET}"
        for size, by_way in figures["staged_growth"].items()
        for way, value in by_way.items()
        if value > STAGED_GROWTH_TARGET
    ]
    return misses + [
        f"full_rate_ratio at {size} MB is {value:.2f}, above {FULL_RATE_RATIO_TARGET}"
        for size, value in figures["full_rate_ratio"].items()
        if size != "1.5" and value > FULL_RATE_RATIO_TARGET
    ]


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (
        ("seen_stall_s", "stall seen", 1e3, 1),
        ("reported_stall_s", "reported", 1e3, 1),
        ("usual_gap_s", "usual gap", 1e3, 1),
        ("longest_gap_before_s", "gap before", 1e3, 1),
        ("prepare_s", "prepare", 1e3, 1),
        ("transfer_s", "transfer", 1e3, 0),
        ("publish_cpu_s", "CPU", 1e3, 0),
        ("reprefilled_tokens", "re-prefill", 1, 0),
    )
    print("milliseconds, medians; re-prefilled tokens of all running requests")
    print(f"{'MB':>4} {'KV':<10}{'rate':<6}{'way':<7}" + "".join(f"{c[1]:>11}" for c in columns))
    for row in rows:
        cells = "".join(f"{scale * row[name]:>11,.{n}f}" for name, _, scale, n in columns)
        kv, rate, way = row["kv_after_swap"], row["rate"], row["way"]
        print(f"{row['megabytes']:>4} {kv:<10}{rate:<6}{way:<7}{cells}")


async def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    everything = os.sched_getaffinity(0)
    load = os.getloadavg()[0]
    os.sched_setaffinity(0, everything - {max(everything)} or everything)
    loopback = await loopback_rate()
    os.sched_setaffinity(0, everything)
    rows, version = [], ""
    for size in ("1.5", "50") if args.quick else tuple(SHAPES):
        of_size, version = await measure_size(size, loopback, args)
        rows += of_size
        print_table(of_size)
    figures = evaluate(rows)
    more = {"loopback_bytes_per_s": loopback, "sglang": version, "load_average_at_start": load}
    finish(
        "sglang_update",
        {**figures, **more, "rows": rows},
        find_misses(figures),
        started,
        args.output,
    )


def main() -> None:
    torch.set_num_threads(1)
    asyncio.run(run(parse_sglang_args("Stalls of an SGLang server by new weights.")))


if __name__ == "__main__":
    main()
