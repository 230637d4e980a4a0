"""What does a new version cost an SGLang server: an adapter against whole merged weights?

The same policy and the same eight running requests, twice: with a server that gets merged weights
from shared memory (``merged``), and with one that was started for adapters and gets those, as a
folder in memory (``folder``, what a run does) or as tensors in shared memory (``tensors``). What
lies beside the server has arrived already; ``bytes`` is what the network had to carry for it.

A stall is what a request sees: the longest time between two of its tokens around a load, minus the
usual time, the median of all requests and loads. Under ``recompute`` running requests end and go on
with the new adapter, and their context is computed again, as it is with merged weights; under
``keep`` they go on with what they have. The server has a core to itself.

    python benchmarks/sglang_adapters.py --quick --sglang-python .sglang/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import time
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import aiohttp
import torch
from report import finish
from sglang_adapters_traffic import CONTEXT_LENGTH, NUM_REQUESTS, Load, measure
from sglang_serving import parse_sglang_args, serving

from skyrl_async.learner.lora import (
    LoraSettings,
    adapter_parameters,
    add_adapter,
    fill_adapter,
    merged_parameters,
)
from skyrl_async.learner.lora_merge import MergedWeight
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.engine_launch import ServedAdapters
from skyrl_async.rollout.engine_process import RunningServer
from skyrl_async.rollout.sglang_protocol import adapter_name, adapter_version
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.sglang_adapters import AdapterLoader, AdapterSettings, check_adapter
from skyrl_async.weight_sync.sglang_control import SglangControl
from skyrl_async.weight_sync.sglang_loader import SglangLoader

Kv = Literal["recompute", "keep"]

SHAPES: Mapping[str, Mapping[str, int]] = {
    "50": {"hidden_size": 448, "num_layers": 7, "num_heads": 8},
    "200": {"hidden_size": 768, "num_layers": 10, "num_heads": 12},
}
"""Of the built-in policy, by megabytes in float32."""
RANK, ALPHA = 16, 32.0
BYTES_RATIO_TARGET = 0.2


class Policy:
    """A policy with adapters, and both forms of what is published, in shared memory."""

    def __init__(self, size: str) -> None:
        model = build_tiny_model(**SHAPES[size])
        self.model = add_adapter(model, LoraSettings(rank=RANK, alpha=ALPHA))
        fill_adapter(self.model.named_parameters(), seed=0)
        merged = [
            (n, w.base if isinstance(w, MergedWeight) else w)
            for n, w in merged_parameters(self.model)
        ]
        self.merged = FlatBuffer(WeightLayout.of(merged), shared=True)
        self.layout = WeightLayout.of(adapter_parameters(self.model))
        self.bytes = {"merged": len(self.merged.data), "adapter": self.layout.size_bytes}

    @torch.no_grad()
    def change(self) -> None:
        """Make another version."""
        for _, side in adapter_parameters(self.model):
            side.add_(0.01 * torch.randn(side.shape))

    @torch.no_grad()
    def merged_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return all weights as they are now."""
        for name, weight in merged_parameters(self.model):
            out = self.merged.tensors.get(name)
            if out is not None:
                weight.write_to(out) if isinstance(weight, MergedWeight) else out.copy_(weight)
        return self.merged.tensors

    @torch.no_grad()
    def adapter_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the adapter as it is now, in memory of its own: servers may go on using it."""
        buffer = FlatBuffer(self.layout, shared=True)
        for name, side in adapter_parameters(self.model):
            buffer.tensors[name].copy_(side)
        return buffer.tensors


def merged_load(policy: Policy, control: SglangControl, kv: Kv) -> Load:
    loader = SglangLoader(control, kv_after_swap=kv, way="memory")

    async def load(version: int) -> float:
        weights = policy.merged_tensors()
        return (await loader.load(weights, policy_version=version, timeout_s=60)).stall_s

    return load


def folder_load(policy: Policy, control: SglangControl, kv: Kv) -> Load:
    loader = AdapterLoader(
        control,
        settings=AdapterSettings(rank=RANK, alpha=ALPHA),
        kv_after_swap=kv,
        name_of=adapter_name,
        is_ours=lambda name: adapter_version(name) is not None,
    )

    async def load(version: int) -> float:
        weights = policy.adapter_tensors()
        return (await loader.load(weights, policy_version=version, timeout_s=60)).stall_s

    return load


def tensors_payload(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return base64 of the pickled mapping, which refers to shared memory."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(dict(tensors))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()


def tensors_load(policy: Policy, server: RunningServer) -> Load:
    """Return a load that leaves running requests and older adapters alone."""
    held: list[Any] = []

    async def load(version: int) -> float:
        tensors = policy.adapter_tensors()
        held.append(tensors)
        modules = check_adapter(tensors, rank=RANK)
        body = {
            "lora_name": adapter_name(version),
            "config_dict": {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": ALPHA,
                "target_modules": list(modules),
            },
            "serialized_named_tensors": [tensors_payload(tensors)],
        }
        headers = {"Authorization": f"Bearer {server.admin_key}"}
        started = time.monotonic()
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{server.url}/load_lora_adapter_from_tensors", json=body) as response,
        ):
            if response.status != 200:
                raise RuntimeError(await response.text())
        return time.monotonic() - started

    return load


async def with_server(
    size: str, args: argparse.Namespace, served: ServedAdapters | None, body: Any
) -> None:
    """Call ``body(server, control)`` with a server of this size."""
    async with serving(
        SHAPES[size],
        python=args.sglang_python,
        context_length=CONTEXT_LENGTH,
        max_running_requests=NUM_REQUESTS + 1,
        adapters=served,
    ) as server:
        control = SglangControl(url=server.url, admin_key=server.admin_key)
        try:
            await body(server, control)
        finally:
            await control.close()


async def measure_size(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    policy = Policy(size)
    modules = check_adapter(dict(adapter_parameters(policy.model)), rank=RANK)
    count = 2 if args.quick else 4
    rows: list[dict[str, Any]] = []

    def add(way: str, kv: str, row: Mapping[str, float]) -> None:
        size_bytes = policy.bytes["merged" if way == "merged" else "adapter"]
        rows.append(
            {"megabytes": size, "way": way, "kv_after_swap": kv, "bytes": size_bytes, **row}
        )

    async def merged(server: RunningServer, control: SglangControl) -> None:
        await merged_load(policy, control, "recompute")(1)
        kinds: tuple[Kv, Kv] = ("recompute", "keep")
        for first, kv in zip((10, 20), kinds, strict=True):
            load = changed(policy, merged_load(policy, control, kv))
            add(
                "merged",
                kv,
                await measure(server, load, range(first, first + count), adapters=False),
            )

    async def adapters(server: RunningServer, control: SglangControl) -> None:
        cells: tuple[tuple[int, str, Kv], ...] = (
            (30, "folder", "recompute"),
            (40, "folder", "keep"),
            (50, "tensors", "keep"),
        )
        for first, way, kv in cells:
            load = (
                tensors_load(policy, server)
                if way == "tensors"
                else folder_load(policy, control, kv)
            )
            row = await measure(
                server, changed(policy, load), range(first, first + count), adapters=True
            )
            add(way, kv, row)

    await with_server(size, args, None, merged)
    served = ServedAdapters(rank=RANK, target_modules=modules, num_slots=16)
    await with_server(size, args, served, adapters)
    return rows


def changed(policy: Policy, load: Load) -> Load:
    async def changed_load(version: int) -> float:
        policy.change()
        return await load(version)

    return changed_load


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    heads = (("bytes", 12), ("stall ms", 10), ("call ms", 9), ("gap ms", 8), ("tok/s", 8))
    print(f"{'MB':>4} {'way':<8}{'KV':<10}" + "".join(f"{name:>{n}}" for name, n in heads))
    for row in rows:
        print(
            f"{row['megabytes']:>4} {row['way']:<8}{row['kv_after_swap']:<10}{row['bytes']:>12,}"
            f"{1e3 * row['seen_stall_s']:>10.1f}{1e3 * row['reported_stall_s']:>9.1f}"
            f"{1e3 * row['usual_gap_s']:>8.1f}{row['tokens_per_s']:>8.0f}"
        )


async def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for size in ("50",) if args.quick else tuple(SHAPES):
        of_size = await measure_size(size, args)
        print_table(of_size)
        rows += of_size
    by = {(r["megabytes"], r["way"], r["kv_after_swap"]): r for r in rows}
    sizes = list(dict.fromkeys(row["megabytes"] for row in rows))
    figures: dict[str, Any] = {
        "bytes_ratio": {
            s: by[s, "folder", "keep"]["bytes"] / by[s, "merged", "keep"]["bytes"] for s in sizes
        },
        "stall_s": {
            s: {f"{w} {kv}": r["seen_stall_s"] for (z, w, kv), r in by.items() if z == s}
            for s in sizes
        },
        "throughput_ratio": {
            s: by[s, "folder", "keep"]["tokens_per_s"] / by[s, "merged", "keep"]["tokens_per_s"]
            for s in sizes
        },
    }
    misses = [
        f"bytes_ratio at {s} MB is {value:.3f}, above {BYTES_RATIO_TARGET}"
        for s, value in figures["bytes_ratio"].items()
        if value > BYTES_RATIO_TARGET
    ]
    finish("sglang_adapters", {**figures, "rank": RANK, "rows": rows}, misses, started, args.output)


def main() -> None:
    torch.set_num_threads(1)
    asyncio.run(run(parse_sglang_args("An adapter against merged weights, into an SGLang server.")))


if __name__ == "__main__":
    main()
