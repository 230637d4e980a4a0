"""Does publishing 50 MB of weights, over and over, slow down an engine that decodes all the time?

Two processes, as in a run. One holds the embedded engine, whose thread has a core to itself. The
other core has all the rest: the learner process (changes its weights, takes a snapshot, publishes
it over gloo, and goes on to the next version as soon as this one is live) and the threads of the
receiver beside the engine. In the control, the learner process keeps its core busy in a loop
instead, in which it changes its weights as often as before. Windows of both kinds alternate within
one run, and the ratio is the median over pairs of neighboring windows, so that other programs
disturb both alike.

A gap is the time from the end of one decode step to the end of the next, the step included, in
units of the control's median. Replies start at different times and prompts are short, so that no
step has much of a prefill. Of the three parts of a gap (``decode_steps.py``), the engine is blocked
by the interpreter's lock, which it shares with the receiver, and preempted by other programs;
figures without preemption leave their part out.

    python benchmarks/publish_stall.py --quick
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from multiprocessing.connection import Connection
from operator import attrgetter, getitem
from typing import Any, Literal

import torch
from decode_steps import Step, StepLog, time_parts, total
from report import finish, parse_args
from transformers import Qwen3ForCausalLM

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import Sampling
from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.publisher import WeightPublisher
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool

Mode = Literal["publish", "spin"]

THROUGHPUT_RATIO_TARGET = 0.95
GAP_DECODE_STEPS_TARGET = 2.0
"""Beside the swap itself."""
PREEMPTED_FRACTION_LIMIT = 0.05
"""Of the engine's time; above it the machine was too busy to tell."""

NUM_REQUESTS, PROMPT_TOKENS = 16, 4
NEW_TOKENS = (48, 112)
"""Fewest and most of a reply."""
SETTLE_S = 0.3
WAIT_S = 60.0


def make_model() -> Qwen3ForCausalLM:
    model = build_tiny_model(hidden_size=448, num_layers=7, num_heads=8)
    return model.requires_grad_(False)


def checksum(model: Qwen3ForCausalLM) -> int:
    crc = 0
    for parameter in model.parameters():
        values: Any = parameter.numpy()
        crc = zlib.crc32(values, crc)
    return crc


def learn(pipe: Connection) -> None:
    """Publish or spin, as the last message says; answer each with version and checksum."""
    torch.set_num_threads(1)
    # The control leaves the published weights alone, so that the engine's stay the newest.
    publishing, training = make_model(), make_model()
    pool = SnapshotPool(publishing.named_parameters())
    sender = CollectiveSender("engine", store=host_store())
    publisher = WeightPublisher({"engine": sender}, timeout_s=WAIT_S / 2)
    pipe.send(sender.address)
    version, period_s = 0, 0.0
    mode = pipe.recv()
    while mode != "end":
        pipe.send((version, checksum(publishing)))
        started_s, first = time.perf_counter(), version
        while not pipe.poll():
            if mode == "spin":
                spin(training, period_s)
                continue
            version += 1
            change(publishing)
            publisher.publish(pool.take(version))
            if not publisher.wait_idle(WAIT_S) or publisher.engine_versions != {"engine": version}:
                raise RuntimeError(f"the engine did not load policy version {version}")
        if version > first:
            period_s = (time.perf_counter() - started_s) / (version - first)
        mode = pipe.recv()
    publisher.close()


def change(model: Qwen3ForCausalLM) -> None:
    """Stand in for a learner step."""
    for parameter in model.parameters():
        parameter.mul_(0.999)


def spin(model: Qwen3ForCausalLM, period_s: float) -> None:
    """Be busy for the time of one publish, and change the weights once."""
    started_s = time.perf_counter()
    change(model)
    while time.perf_counter() < started_s + period_s:
        sum(range(10_000))


class Bench:
    """The engine's process: engine, requests, receiver, and the pipe to the learner."""

    def __init__(self, pipe: Connection, kv_after_swap: Any, *, receiver_cpus: set[int]) -> None:
        self._pipe = pipe
        self._receiver_cpus = receiver_cpus
        self._model = make_model()
        self._engine = EmbeddedEngine(
            self._model,
            max_concurrent=NUM_REQUESTS,
            context_length=PROMPT_TOKENS + NEW_TOKENS[1],
            kv_after_swap=kv_after_swap,
        )
        self._log = StepLog(self._engine)

    async def measure(self, *, pairs: int, window_s: float) -> list[dict[Mode, list[Step]]]:
        """Return the decode steps of each pair of windows."""
        receiver = self._connect(asyncio.get_running_loop(), await self._told())
        serving = [
            asyncio.create_task(work)
            for work in (
                self._engine.run(),
                self._log.run(),
                *(self._ask(str(index)) for index in range(NUM_REQUESTS)),
            )
        ]
        measured = []
        try:
            # Makes the pair's group and the staging buffers, and sets the requests apart in time.
            await self._window("publish", window_s, serving)
            for index in range(pairs):
                order: list[Mode] = ["spin", "publish"] if index % 2 else ["publish", "spin"]
                measured.append(
                    {mode: await self._window(mode, window_s, serving) for mode in order}
                )
            version, expected = await self._switch("spin")
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            self._pipe.send("end")
            receiver.close()
        if (self._engine.policy_version, checksum(self._model)) != (version, expected):
            raise RuntimeError(f"the engine's weights are not those of policy version {version}")
        return measured

    def _connect(self, loop: asyncio.AbstractEventLoop, address: Any) -> WeightReceiver:
        def load(weights: Mapping[str, torch.Tensor], policy_version: int) -> None:
            loading = self._engine.load_weights(weights, policy_version=policy_version)
            asyncio.run_coroutine_threadsafe(loading, loop).result(WAIT_S)

        expected = WeightLayout.of(self._model.named_parameters())
        transport = CollectiveReceiver(address, expected=expected, policy_version=0)
        return WeightReceiver(transport, load, cpus=self._receiver_cpus)

    async def _ask(self, name: str) -> None:
        rng = random.Random(name)
        number = 0
        while True:
            number += 1
            await self._engine.generate(
                rng.choices(range(64), k=PROMPT_TOKENS),
                Sampling(max_tokens=rng.randint(*NEW_TOKENS)),
                request_id=f"{name}/{number}",
            )

    async def _window(
        self, mode: Mode, window_s: float, serving: Sequence[asyncio.Task[None]]
    ) -> list[Step]:
        await self._switch(mode)
        await asyncio.sleep(SETTLE_S)
        self._log.take()
        await asyncio.sleep(window_s)
        for task in serving:
            if task.done():
                raise RuntimeError("the engine or a request ended") from task.exception()
        return self._log.take()

    async def _switch(self, mode: Mode) -> tuple[int, int]:
        """Return version and checksum of the weights that the learner has published so far."""
        self._pipe.send(mode)
        return await self._told()

    async def _told(self) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not self._pipe.poll():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the learner process said nothing for {WAIT_S:.0f} s")
            await asyncio.sleep(0.001)
        return self._pipe.recv()


def measure(kv_after_swap: str, cpus: tuple[int, int], **amount: Any) -> dict[str, Any]:
    """Return the row of one treatment of the KV cache."""
    engine_cpu, other_cpu = cpus
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    learner = context.Process(target=learn, args=(theirs,), daemon=True)
    os.sched_setaffinity(0, {other_cpu})
    learner.start()
    theirs.close()
    os.sched_setaffinity(0, {engine_cpu})
    try:
        bench = Bench(ours, kv_after_swap, receiver_cpus={other_cpu})
        windows = asyncio.run(bench.measure(**amount))
        learner.join(WAIT_S)
    finally:
        learner.kill()
    return {"kv_after_swap": kv_after_swap, **evaluate(windows)}


def evaluate(windows: Sequence[Mapping[Mode, Sequence[Step]]]) -> dict[str, Any]:
    publishing = [step for pair in windows for step in pair["publish"]]
    control = [step for pair in windows for step in pair["spin"]]
    longest = max(publishing, key=attrgetter("gap_s"))
    swaps_s = [step.swap_s for step in publishing if step.swaps]
    publishes_per_s = sum(step.swaps for step in publishing) / total(publishing, "gap_s")
    size_bytes = WeightLayout.of(make_model().named_parameters()).size_bytes
    return {
        **compare(windows, seconds="gap_s"),
        "unpreempted": compare(windows, seconds="own_s"),
        "longest_gap_swap_ms": 1e3 * longest.swap_s,
        "longest_gap_preempted_ms": 1e3 * longest.preempted_s,
        "swap_ms_median": 1e3 * statistics.median(swaps_s),
        "swap_ms_max": 1e3 * max(swaps_s),
        "publishes_per_s": publishes_per_s,
        "megabytes_per_s": publishes_per_s * size_bytes / 1e6,
        "megabytes": size_bytes / 1e6,
        "versions_loaded": sum(step.swaps for step in publishing),
        "time": {"publish": time_parts(publishing), "spin": time_parts(control)},
    }


def compare(windows: Sequence[Mapping[Mode, Sequence[Step]]], *, seconds: str) -> dict[str, float]:
    """Return figures in terms of the attribute ``seconds`` of the steps."""
    rates = [
        {mode: total(steps, "tokens") / total(steps, seconds) for mode, steps in pair.items()}
        for pair in windows
    ]
    gap_s = attrgetter(seconds)
    publishing_s = [gap_s(step) for pair in windows for step in pair["publish"]]
    control_s = [gap_s(step) for pair in windows for step in pair["spin"]]
    decode_step_s = statistics.median(control_s)
    return {
        "throughput_ratio": statistics.median(pair["publish"] / pair["spin"] for pair in rates),
        "tokens_per_s": statistics.median(pair["publish"] for pair in rates),
        "control_tokens_per_s": statistics.median(pair["spin"] for pair in rates),
        "decode_step_ms": 1e3 * decode_step_s,
        "longest_gap_ms": 1e3 * max(publishing_s),
        "longest_gap_decode_steps": max(publishing_s) / decode_step_s,
        "control_longest_gap_decode_steps": max(control_s) / decode_step_s,
    }


def find_misses(row: Mapping[str, Any]) -> list[str]:
    misses = []
    if row["throughput_ratio"] < THROUGHPUT_RATIO_TARGET:
        misses.append(
            f"throughput_ratio {row['throughput_ratio']:.3f} is below {THROUGHPUT_RATIO_TARGET} "
            f"({row['unpreempted']['throughput_ratio']:.3f} without preemption)"
        )
    limit = GAP_DECODE_STEPS_TARGET + row["longest_gap_swap_ms"] / row["decode_step_ms"]
    if row["longest_gap_decode_steps"] > limit:
        misses.append(
            f"longest_gap_decode_steps {row['longest_gap_decode_steps']:.2f} is above {limit:.2f} "
            f"({row['control_longest_gap_decode_steps']:.2f} in the control; other programs took "
            f"{row['longest_gap_preempted_ms']:.0f} of its {row['longest_gap_ms']:.0f} ms)"
        )
    for mode, parts in row["time"].items():
        fraction = parts["preempted_ms"] / sum(parts.values())
        if fraction > PREEMPTED_FRACTION_LIMIT:
            misses.append(
                f"other programs had the engine's core for {fraction:.0%} of the time "
                f"({mode}); run it on a quiet machine"
            )
    return misses


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{rows[0]['megabytes']:.1f} MB of weights, {NUM_REQUESTS} requests")
    print(f"{'KV after swap':<44}" + "".join(f"{row['kv_after_swap']:>12}" for row in rows))
    for label, place, digits in (
        ("tokens/s while publishing", ("tokens_per_s",), 0),
        ("tokens/s in the control", ("control_tokens_per_s",), 0),
        ("ratio, median of pairs", ("throughput_ratio",), 3),
        ("  without preemption by other programs", ("unpreempted", "throughput_ratio"), 3),
        ("decode step, median ms", ("decode_step_ms",), 2),
        ("longest gap, ms", ("longest_gap_ms",), 1),
        ("longest gap, decode steps", ("longest_gap_decode_steps",), 2),
        ("  in the control", ("control_longest_gap_decode_steps",), 2),
        ("  without preemption", ("unpreempted", "longest_gap_decode_steps"), 2),
        ("  and in the control", ("unpreempted", "control_longest_gap_decode_steps"), 2),
        ("swap, median ms", ("swap_ms_median",), 2),
        ("publishes/s", ("publishes_per_s",), 2),
        ("MB/s", ("megabytes_per_s",), 0),
        ("versions loaded", ("versions_loaded",), 0),
        ("mean step, ms running", ("time", "publish", "running_ms"), 2),
        ("  in the control", ("time", "spin", "running_ms"), 2),
        ("mean step, ms preempted", ("time", "publish", "preempted_ms"), 2),
        ("  in the control", ("time", "spin", "preempted_ms"), 2),
        ("mean step, ms blocked", ("time", "publish", "blocked_ms"), 2),
        ("  in the control", ("time", "spin", "blocked_ms"), 2),
    ):
        cells = (f"{reduce(getitem, place, row):>12,.{digits}f}" for row in rows)
        print(f"{label:<44}" + "".join(cells))


def main() -> None:
    arguments = parse_args("Decoding while 50 MB of weights are published continuously.")
    started = time.perf_counter()
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("publish_stall.py needs Linux and two cores: one for the engine alone")
    *_, other_cpu, engine_cpu = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    window_s = 1.5 if arguments.quick else 3.0
    rows = [
        measure(mode, (engine_cpu, other_cpu), pairs=pairs, window_s=window_s)
        for mode, pairs in (("keep", 5 if arguments.quick else 20), ("recompute", 2))
    ]
    print_table(rows)
    figures = {**rows[0], "rows": rows, "load_average_at_start": load}
    finish("publish_stall", figures, find_misses(rows[0]), started, arguments.output)


if __name__ == "__main__":
    main()
