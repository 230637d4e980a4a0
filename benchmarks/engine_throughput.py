"""How fast is the embedded engine on one core, and what does a weight swap cost it?

Three measurements, all with sampling over the whole vocabulary and logprobs:

* long replies: 64 concurrent requests of 32 prompt tokens and 128 new ones, built-in model of width
  128, against the continuous batching of `transformers` on the same model and requests, in turns;
* short replies: 256 concurrent episodes of 6 turns, prompts and observations of 6 to 10 tokens,
  replies of 2 to 4, width 64; each next turn starts as soon as the previous reply is there;
* swaps: replies of 48 tokens through 3 weight swaps, with the KV cache recomputed or kept
  (``swap_cost.py``).

Other programs only make a round slower, so each throughput is that of the best round.

With ``--device cuda`` only the first is measured, with 64 and with 256 concurrent requests of 256
prompt tokens and 256 new ones, on a model of 0.6 B parameters (random weights, bfloat16).

    python benchmarks/engine_throughput.py --quick
    python benchmarks/engine_throughput.py --device cuda
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from report import argument_parser, finish
from running_engine import random_ids, running
from swap_cost import MODES, UPDATE_SIZES, swap_row
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import Sampling

TOKENS_PER_S_TARGET = 15_000
SPEEDUP_TARGET = 3.0
SHORT_REQUESTS_PER_S_TARGET = 6_000

GPU_CONCURRENT = (64, 256)
NUM_EPISODES, TURNS = 256, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Requests that are decoded at once, all alike."""

    concurrent: int
    prompt_tokens: int
    new_tokens: int
    page_size: int
    """Of the baseline's cache; of 16, 32, 160 and 256 tokens 32 were the fastest on a CPU."""

    @property
    def context_length(self) -> int:
        """Tokens of one request."""
        return self.prompt_tokens + self.new_tokens


CPU_SHAPE = Shape(concurrent=64, prompt_tokens=32, new_tokens=128, page_size=32)


class LongReplies:
    """The same requests for both engines; each has its own copy of the model."""

    def __init__(self, model: Qwen3ForCausalLM, shape: Shape) -> None:
        self._model, self._baseline_model = model, copy.deepcopy(model)
        self._shape = shape
        rng = random.Random(0)
        size = model.config.vocab_size
        self._prompts = [
            random_ids(rng, shape.prompt_tokens, vocab_size=size) for _ in range(shape.concurrent)
        ]

    def ours(self, rounds: int) -> list[float]:
        """Return tokens per second of each round."""
        return asyncio.run(self._ours(rounds))

    async def _ours(self, rounds: int) -> list[float]:
        shape = self._shape
        sampling = Sampling(max_tokens=shape.new_tokens)
        rates = []
        async with running(
            self._model, max_concurrent=shape.concurrent, context_length=shape.context_length
        ) as engine:
            for _ in range(rounds):
                started = time.perf_counter()
                generations = await asyncio.gather(
                    *(
                        engine.generate(prompt, sampling, request_id=str(i))
                        for i, prompt in enumerate(self._prompts)
                    )
                )
                tokens = sum(len(g.token_ids) for g in generations)
                rates.append(tokens / (time.perf_counter() - started))
        return rates

    def baseline(self, rounds: int) -> list[float]:
        """Return tokens per second of each round, without making and warming up the manager."""
        shape = self._shape
        generation = GenerationConfig(
            max_new_tokens=shape.new_tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1
        )
        batching = ContinuousBatchingConfig(
            page_size=shape.page_size,
            num_blocks=shape.concurrent * (-(-shape.context_length // shape.page_size) + 1),
            max_batch_tokens=max(512, 8 * shape.concurrent),
            max_requests_per_batch=shape.concurrent,
            return_logprobs=True,
            seed=0,
        )
        rates = []
        for _ in range(rounds):
            started = time.perf_counter()
            outputs = self._baseline_model.generate_batch(
                self._prompts,
                generation_config=generation,
                continuous_batching_config=batching,
                persistent_manager=True,
            )
            tokens = sum(len(output.generated_tokens) for output in outputs.values())
            if tokens != shape.concurrent * shape.new_tokens:
                raise RuntimeError(f"the baseline returned {tokens} tokens")
            rates.append(tokens / (time.perf_counter() - started))
        return rates

    def close(self) -> None:
        """Free the baseline's cache."""
        self._baseline_model.destroy_cached_continuous_batching_manager()


def long_replies(model: Qwen3ForCausalLM, shape: Shape, *, rounds: int) -> tuple[float, float]:
    """Return tokens per second of the best rounds, of ours and of the baseline."""
    long = LongReplies(model, shape)
    ours, baseline = [], []
    for _ in range(rounds):
        ours += long.ours(2)
        baseline += long.baseline(1)
    long.close()
    return max(ours), max(baseline)


async def short_replies(rounds: int, *, episodes_each: int) -> list[tuple[float, float]]:
    """Return requests and tokens per second of each round."""
    rng = random.Random(0)
    samplings = [Sampling(max_tokens=count) for count in (2, 3, 4)]
    model = build_tiny_model(hidden_size=64)
    tokens = 0

    async def play(engine: EmbeddedEngine, name: str) -> None:
        nonlocal tokens
        context = random_ids(rng, rng.randint(6, 10), vocab_size=64)
        for turn in range(TURNS):
            reply = await engine.generate(
                context, rng.choice(samplings), request_id=f"{name}/{turn}", session_id=name
            )
            tokens += len(reply.token_ids)
            observation = random_ids(rng, rng.randint(6, 10), vocab_size=64)
            context = [*context, *reply.token_ids.tolist(), *observation]
        engine.release(name)

    async def play_all(engine: EmbeddedEngine, name: str) -> None:
        for episode in range(episodes_each):
            await play(engine, f"{name}/{episode}")

    rates = []
    async with running(model, max_concurrent=NUM_EPISODES, context_length=128) as engine:
        for _ in range(rounds):
            tokens = 0
            started = time.perf_counter()
            await asyncio.gather(*(play_all(engine, str(i)) for i in range(NUM_EPISODES)))
            seconds = time.perf_counter() - started
            rates.append((NUM_EPISODES * episodes_each * TURNS / seconds, tokens / seconds))
    return rates


def measure(*, quick: bool) -> dict[str, Any]:
    rounds = 3 if quick else 8
    ours, baseline = long_replies(
        build_tiny_model(hidden_size=128, vocab_size=320), CPU_SHAPE, rounds=rounds
    )
    short = asyncio.run(short_replies(2 * rounds, episodes_each=2))
    swaps = [asyncio.run(swap_row(mode, size)) for size in UPDATE_SIZES for mode in MODES]
    short_requests_per_s, short_tokens_per_s = max(short)
    return {
        "tokens_per_s": ours,
        "baseline_tokens_per_s": baseline,
        "speedup": ours / baseline,
        "short_requests_per_s": short_requests_per_s,
        "short_tokens_per_s": short_tokens_per_s,
        "swaps": swaps,
    }


def gpu_model() -> Qwen3ForCausalLM:
    """Return a model with the sizes of Qwen3-0.6B."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


def measure_gpu(*, quick: bool) -> dict[str, Any]:
    rows = []
    model = gpu_model()
    for concurrent in GPU_CONCURRENT:
        shape = Shape(concurrent=concurrent, prompt_tokens=256, new_tokens=256, page_size=256)
        torch.cuda.reset_peak_memory_stats()
        ours, baseline = long_replies(model, shape, rounds=1 if quick else 3)
        rows.append(
            {
                "concurrent": concurrent,
                "tokens_per_s": ours,
                "baseline_tokens_per_s": baseline,
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
        )
        print(
            f"{concurrent:>4} concurrent: {ours:,.0f} tokens/s, transformers {baseline:,.0f}",
            flush=True,
        )
    return {"device": torch.cuda.get_device_name(), "rows": rows}


def find_misses(figures: dict[str, Any]) -> list[str]:
    targets = {
        "tokens_per_s": TOKENS_PER_S_TARGET,
        "speedup": SPEEDUP_TARGET,
        "short_requests_per_s": SHORT_REQUESTS_PER_S_TARGET,
    }
    return [
        f"{name} {figures[name]:.1f} is below {target}"
        for name, target in targets.items()
        if figures[name] < target
    ]


def print_table(figures: dict[str, Any]) -> None:
    print(f"{'one core':<44}{'requests/s':>12}{'tokens/s':>12}")
    for label, requests, tokens in (
        ("64 concurrent, 32 + 128 tokens, width 128", None, figures["tokens_per_s"]),
        ("  transformers continuous batching", None, figures["baseline_tokens_per_s"]),
        (
            "256 episodes, 2-4 tokens a reply, width 64",
            figures["short_requests_per_s"],
            figures["short_tokens_per_s"],
        ),
    ):
        shown = "" if requests is None else f"{requests:,.0f}"
        print(f"{label:<44}{shown:>12}{tokens:>12,.0f}")
    print(
        f"\n{'KV after swap':<15}{'update':>8}{'mean deviation':>16}{'max deviation':>15}"
        f"{'re-prefilled':>14}{'ms/swap':>9}{'tokens/s':>10}"
    )
    for row in figures["swaps"]:
        print(
            f"{row['kv_after_swap']:<15}{row['update_size']:>8}"
            f"{row['logprob_deviation_mean']:>16.1e}{row['logprob_deviation_max']:>15.1e}"
            f"{row['reprefilled_tokens']:>14}{row['stall_ms_per_swap']:>9.2f}"
            f"{row['tokens_per_s']:>10,.0f}"
        )


def main() -> None:
    parser = argument_parser("Throughput of the embedded engine on one core, or on a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    started = time.perf_counter()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device here; take --device cpu")
        figures = measure_gpu(quick=arguments.quick)
        finish("engine_throughput", figures, [], started, arguments.output)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    figures = measure(quick=arguments.quick)
    print_table(figures)
    misses = find_misses(figures)
    finish("engine_throughput", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
