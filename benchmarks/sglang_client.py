"""What our client and pool cost against the shortest possible loop, on the same SGLang server.

* **bare**: aiohttp posts the same body without streaming, and reads the JSON. Nothing is checked,
  and a server that dies takes everything with it.
* **client**, **pool**: what rollout actors use; replies are streamed.
* **smg**: the bare loop through the router of that name, with ``--smg``.

Each round runs all ways one after the other, in changing order, with new prompts of 32 tokens and
128 new tokens with logprobs. A ratio is the median over the rounds of the tokens per second over
those of ``bare`` in the same round, so that other programs on the machine matter less; CPU time of
this process does not depend on them.

    python benchmarks/sglang_client.py --quick --sglang-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from report import finish

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_launch import (
    ServerSettings,
    free_port,
    server_command,
    server_environment,
)
from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.rollout.sglang_client import SglangClient
from skyrl_async.rollout.sglang_protocol import make_body, new_rid
from skyrl_async.types import Sampling

RATIO_TARGET = 0.95
PROMPT_TOKENS, NEW_TOKENS, VOCAB_SIZE, CONTEXT_LENGTH = 32, 128, 320, 2048
CONCURRENT = {1: 2, 8: 16, 32: 64}
"""Requests in flight, and requests of one measurement."""

START_TIMEOUT_S = 180.0
HOST = "127.0.0.1"

One = Callable[[list[int]], Awaitable[int]]
"""Sends one prompt and returns the number of new tokens."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher figures")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    parser.add_argument(
        "--sglang-python",
        type=Path,
        default=os.environ.get("SGLANG_PYTHON"),
        help="interpreter that has SGLang (default: $SGLANG_PYTHON)",
    )
    parser.add_argument("--smg", type=Path, help="interpreter that has the router smg")
    parser.add_argument(
        "--cumulative", action="store_true", help="let every chunk repeat all earlier tokens"
    )
    arguments = parser.parse_args()
    if arguments.sglang_python is None:
        parser.error("name an interpreter that has SGLang with --sglang-python")
    return arguments


@contextlib.contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Run a program and all that it starts, until the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


async def answers(url: str, log: Path) -> None:
    """Return when a server at ``url`` generates."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    body = make_body([1], Sampling(max_tokens=1), rid=new_rid(), vocab_size=VOCAB_SIZE)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                body["rid"] = new_rid()
                async with session.post(f"{url}/generate", json=body | {"stream": False}) as reply:
                    if reply.status == 200:
                        return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no server at {url}: {log.read_text()[-2000:]}")
            await asyncio.sleep(0.3)


@contextlib.asynccontextmanager
async def servers(arguments: argparse.Namespace) -> AsyncIterator[dict[str, str]]:
    """Yield the URLs of the server and, if wanted, of the router before it."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        build_tiny_model(hidden_size=128, vocab_size=VOCAB_SIZE).save_pretrained(folder / "model")
        build_tiny_tokenizer().save_pretrained(folder / "model")
        settings = ServerSettings(
            python=arguments.sglang_python,
            model_path=folder / "model",
            log_path=folder / "server.log",
            device="cpu",
            dtype="float32",
            context_length=CONTEXT_LENGTH,
            max_total_tokens=65536,
            extra_args=() if arguments.cumulative else ("--incremental-streaming-output",),
        )
        port = free_port(HOST)
        urls = {"server": f"http://{HOST}:{port}"}
        command = server_command(settings, port=port)
        stack.enter_context(running(command, settings.log_path, server_environment(settings)))
        await answers(urls["server"], settings.log_path)
        async with aiohttp.ClientSession() as session:
            label = {"new_version": "0", "abort_all_requests": False}
            async with session.post(f"{urls['server']}/update_weight_version", json=label) as done:
                done.raise_for_status()
        if arguments.smg is not None:
            port, metrics_port = free_port(HOST), free_port(HOST)
            urls["smg"] = f"http://{HOST}:{port}"
            command = [
                *(str(arguments.smg), "-m", "smg.launch_router"),
                *("--worker-urls", urls["server"], "--host", HOST, "--port", str(port)),
                *("--policy", "least_load", "--prometheus-host", HOST),
                *("--prometheus-port", str(metrics_port)),
            ]
            stack.enter_context(running(command, folder / "smg.log"))
            await answers(urls["smg"], folder / "smg.log")
        yield urls


def bare(session: aiohttp.ClientSession, url: str) -> One:
    async def one(prompt: list[int]) -> int:
        sampling = Sampling(max_tokens=NEW_TOKENS)
        body = make_body(prompt, sampling, rid=new_rid(), vocab_size=VOCAB_SIZE, extra_key="0")
        body["stream"] = False
        async with session.post(f"{url}/generate", json=body) as response:
            return len((await response.json())["meta_info"]["output_token_logprobs"])

    return one


@contextlib.asynccontextmanager
async def ways(urls: dict[str, str]) -> AsyncIterator[dict[str, One]]:
    """Yield what is compared."""
    endpoint = EngineEndpoint(engine_id="e0", url=urls["server"], api_key=None, policy_version=0)
    client = SglangClient(endpoint, vocab_size=VOCAB_SIZE)
    await client.server_info()
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
    runner = asyncio.create_task(pool.run())
    pool.set_engines([endpoint])
    sampling = Sampling(max_tokens=NEW_TOKENS)

    async def through_client(prompt: list[int]) -> int:
        reply = await client.generate(prompt, sampling, rid=new_rid(), extra_key="0")
        return len(reply.token_ids)

    async def through_pool(prompt: list[int]) -> int:
        name = new_rid()
        generation = await pool.generate(prompt, sampling, request_id=name, session_id=name)
        pool.release(name)
        return len(generation.token_ids)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        result = {
            "bare": bare(session, urls["server"]),
            "client": through_client,
            "pool": through_pool,
        }
        if "smg" in urls:
            result["smg"] = bare(session, urls["smg"])
        try:
            yield result
        finally:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)
            await client.close()


async def one_measurement(
    one: One, rng: random.Random, *, concurrent: int, requests: int
) -> tuple[float, float]:
    """Return tokens per second of ``requests`` requests, and CPU seconds of this process."""
    prompts = [rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS) for _ in range(requests)]
    counts: list[int] = []

    async def worker() -> None:
        while prompts:
            counts.append(await one(prompts.pop()))

    started, cpu_started = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(concurrent)))
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    if counts != [NEW_TOKENS] * requests:
        raise RuntimeError(f"{requests} requests returned {counts} tokens")
    return sum(counts) / seconds, cpu_s


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    rates: dict[int, dict[str, list[float]]] = {}
    cpu: dict[str, list[float]] = {}
    async with servers(arguments) as urls, ways(urls) as compared:
        names = list(compared)
        for one in compared.values():
            await one_measurement(one, rng, concurrent=8, requests=8)
        for turn in range(3 if arguments.quick else 30):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for concurrent, requests in CONCURRENT.items():
                for name in order:
                    rate, cpu_s = await one_measurement(
                        compared[name], rng, concurrent=concurrent, requests=requests
                    )
                    rates.setdefault(concurrent, {}).setdefault(name, []).append(rate)
                    cpu.setdefault(name, []).append(1e3 * cpu_s / requests)
    return {
        "rows": [row(concurrent, by_way) for concurrent, by_way in rates.items()],
        "cpu_ms_per_request": {name: statistics.median(values) for name, values in cpu.items()},
    }


def row(concurrent: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {
        name: statistics.median(r / b for r, b in zip(values, rates["bare"], strict=True))
        for name, values in rates.items()
        if name != "bare"
    }
    return {
        "concurrent": concurrent,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_to_bare": ratios,
        "rates": rates,
    }


def find_misses(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name} at {row['concurrent']} concurrent is {row['ratio_to_bare'][name]:.3f} of bare, "
        f"below {RATIO_TARGET}"
        for row in rows
        for name in ("client", "pool")
        if row["ratio_to_bare"][name] < RATIO_TARGET
    ]


def print_table(rows: list[dict[str, Any]], cpu: dict[str, float]) -> None:
    names = list(rows[0]["tokens_per_s"])
    print(f"{'tokens/s':<12}" + "".join(f"{name:>10}{'ratio':>8}" for name in names))
    for row in rows:
        cells = "".join(
            f"{row['tokens_per_s'][name]:>10,.0f}{row['ratio_to_bare'].get(name, 1.0):>8.3f}"
            for name in names
        )
        print(f"{row['concurrent']:<12}{cells}")
    cells = "".join(f"{cpu[name]:>10.2f}{'':>8}" for name in names)
    print(f"{'CPU ms/req':<12}{cells}")


def main() -> None:
    arguments = parse_args()
    started = time.perf_counter()
    figures = asyncio.run(measure(arguments))
    print_table(figures["rows"], figures["cpu_ms_per_request"])
    misses = find_misses(figures["rows"])
    figures["chunks"] = "cumulative" if arguments.cumulative else "incremental"
    finish("sglang_client", figures, misses, started, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
