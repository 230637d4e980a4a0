"""Do adapters learn what training all weights learns, and what do they save?

The default game. Both start from the same half-trained policy, which a short run of the default
configuration leaves behind: adapters are made for policies that can do something already, and the
built-in one begins with random weights, most of which an adapter would not change. Each then trains
until a greedy evaluation reaches 0.95, adapters once with merged weights and once with the adapters
alone sent to the engine.

The rate is the default one (2e-3) for all weights and twice that for adapters. The built-in policy
is so small (width 64) that adapters of rank 4 are a tenth of it; the savings of a real model are
larger. ``policies`` has those of the sizes of Qwen3-0.6B and Qwen3-8B.

    python benchmarks/lora.py --output benchmarks/results/lora.json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import finish, parse_args
from run_once import Run, run_once
from transformers import Qwen3Config, Qwen3ForCausalLM

from skyrl_async.learner.lora import LoraSettings, adapter_parameters, add_adapter
from skyrl_async.learner.policy import PolicySource, skeleton
from skyrl_async.weight_sync.layout import WeightLayout

TARGET = 0.95
BASE_STEPS = 25
MAX_STEPS = 500
LORA = LoraSettings(rank=4, alpha=8)
LORA_KEYS = (
    *(f"lora.rank={LORA.rank}", f"lora.alpha={LORA.alpha:g}"),
    "optimizer.learning_rate=4e-3",
)
KINDS = {
    "all weights": (),
    "adapters, merged": (*LORA_KEYS, "lora.publish=merged"),
    "adapters alone": (*LORA_KEYS, "lora.publish=adapter"),
}
QWEN3 = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "tie_word_embeddings": False},
}


def sizes(model: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a rank trains and sends, for all weights and for adapters.

    Args:
        model: without adapters; gets them. Only shapes are used.
        dtype: of published weights; adapters are in float32.
    """
    whole = WeightLayout.of(model.named_parameters(), dtype=dtype)
    all_weights = sum(p.numel() for p in model.parameters())
    add_adapter(model, LORA)
    adapters = sum(p.numel() for _, p in adapter_parameters(model))
    alone = WeightLayout.of(adapter_parameters(model))
    return {
        "all_weights": all_weights,
        "adapters": adapters,
        # AdamW's two moments in float32.
        "optimizer_bytes": 8 * all_weights,
        "optimizer_bytes_adapters": 8 * adapters,
        "publish_bytes": whole.size_bytes,
        "publish_bytes_adapters": alone.size_bytes,
    }


def policies() -> dict[str, Any]:
    """Return the sizes of the built-in policy, and of two real ones in bfloat16."""
    result = {"built-in": sizes(skeleton(PolicySource()), dtype=torch.float32)}
    for name, options in QWEN3.items():
        config = Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, **options)
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        result[name] = sizes(model, dtype=torch.bfloat16)
    return result


def published_bytes(run: Run) -> float:
    """Return what one version cost, as the publisher counted it."""
    return min(m["sync/bytes"] for m in run.metrics if m.get("sync/bytes"))


def train(kind: str, base: Path, place: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Do one run and return its figures."""
    run = run_once(
        place,
        *("runtime=local", f"model.path={base}", f"seed={seed}", f"run.steps={steps}"),
        *(f"run.stop_at_eval_reward={TARGET}", "evaluation.every_steps=20", *KINDS[kind]),
        timeout_s=3600,
    )
    return {
        "kind": kind,
        "seed": seed,
        "steps": run.summary["steps"],
        "seconds": run.summary["seconds"],
        "reward": run.summary["eval_reward_final"],
        "rewards": run.evaluations,
        "publish_bytes": published_bytes(run),
        "command": run.command,
    }


def print_sizes(figures: dict[str, Any]) -> None:
    print(f"\n{'':<14}{'trained':>16}{'optimizer':>14}{'one version':>14}{'with adapters':>38}")
    for name, size in figures.items():
        print(
            f"{name:<14}{size['all_weights']:>16,}"
            f"{size['optimizer_bytes'] / 1e6:>11,.1f} MB{size['publish_bytes'] / 1e6:>11,.1f} MB"
            f"{size['adapters']:>14,}{size['optimizer_bytes_adapters'] / 1e6:>9,.1f} MB"
            f"{size['publish_bytes_adapters'] / 1e6:>9,.1f} MB"
        )


def main() -> None:
    arguments = parse_args(__doc__ or "")
    started = time.perf_counter()
    base_steps, steps = (5, 10) if arguments.quick else (BASE_STEPS, MAX_STEPS)
    rows, misses = [], []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        start = run_once(
            place / "base",
            *("runtime=local", f"run.steps={base_steps}", "evaluation.every_steps=0"),
        )
        base_reward = start.summary["eval_reward_final"]
        print(f"the policy to start from: greedy reward {base_reward:.2f}")
        print(f"{'':<20}{'reward':>8}{'steps':>7}{'seconds':>9}{'bytes a version':>17}")
        for kind in KINDS:
            row = train(kind, place / "base" / "policy", place / kind, steps=steps, seed=0)
            rows.append(row)
            print(
                f"{kind:<20}{row['reward']:>8.2f}{row['steps']:>7}{row['seconds']:>9.0f}"
                f"{row['publish_bytes']:>17,.0f}",
                flush=True,
            )
            if not arguments.quick and row["reward"] < TARGET:
                misses.append(f"{kind}: reward {row['reward']:.2f} is below {TARGET}")
    figures = policies()
    print_sizes(figures)
    finish(
        "lora",
        {"base_reward": base_reward, "rank": LORA.rank, "rows": rows, "policies": figures},
        misses,
        started,
        arguments.output,
    )


if __name__ == "__main__":
    main()
