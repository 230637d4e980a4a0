"""A run's folder with the files of a long run, without the run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from skyrl_async.config import Config
from skyrl_async.config_loading import dump_config
from skyrl_async.metrics.names import METRICS
from skyrl_async.metrics.samples import SampleWriter

SECONDS_PER_STEP = 0.08
_PARTS = {
    "learner": ("wait", "prepare", "proximal", "train", "step", "snapshot", "checkpoint"),
    "engine": ("generate", "swap", "wait_episodes", "idle"),
    "actor": ("generate", "environment", "wait_engine", "wait_group", "wait_admission", "other"),
}
_WORDS = ("guess", "higher", "lower", "5", "7", "3", "<end>", "<user>")


def write_run(folder: Path, *, steps: int, finished: bool = True, seed: int = 0) -> None:
    """Write configuration, metrics of every step, trajectories, timeline, and summary if finished.

    Args:
        folder: of the run; it is made.
        steps: learner steps.
        finished: whether there is a summary.
        seed: of all numbers.
    """
    folder.mkdir(parents=True)
    numbers = random.Random(seed)
    config = Config.model_validate({"run": {"steps": steps}, "staleness": {"max": 4}})
    (folder / "config.yaml").write_text(dump_config(config))
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(metrics_of(step, numbers)) + "\n")
    writer = SampleWriter(folder / "samples.jsonl")
    for version in range(0, steps, 20):
        writer.write([sample_of(version, why, numbers) for why in ("best", "worst", "random")])
    _write_trace(folder / "trace", steps=min(steps, 5000))
    if finished:
        summary = {
            "status": "finished",
            "steps": steps,
            "seconds": steps * SECONDS_PER_STEP,
            "startup_seconds": 4.0,
            "reward_final": 0.98,
            "eval_reward_final": 1.0,
            "staleness_observed_max": 4,
            "tokens_generated": 1000 * steps,
            "dropped": {"stale": steps // 10},
        }
        (folder / "summary.json").write_text(json.dumps(summary))


def metrics_of(step: int, numbers: random.Random) -> dict[str, Any]:
    """Return all metrics of one step."""
    names = [metric.name for metric in METRICS if "<" not in metric.name]
    row: dict[str, Any] = {name: abs(numbers.gauss(0.5, 0.1)) for name in names}
    row |= {"step": step, "time_s": step * SECONDS_PER_STEP, "policy_version": step}
    row |= {"live_version": step - 1, "optimizer_steps": 2 * step}
    row["reward/mean"] = 1 - math.exp(-step / 300) + numbers.gauss(0, 0.03)
    if step % 40:
        del row["eval/reward_mean"]
    for role, parts in _PARTS.items():
        weights = [numbers.random() for _ in parts]
        for part, weight in zip(parts, weights, strict=True):
            row[f"idle/{role}/{part}_fraction"] = weight / sum(weights)
    row["staleness/histogram"] = {str(lag): numbers.randrange(1, 400) for lag in range(5)}
    return row


def sample_of(
    version: int, why: str, numbers: random.Random, *, tokens: int = 64
) -> dict[str, Any]:
    """Return a trajectory in which every other token is sampled."""
    replies = range(1, tokens, 2)
    own = [i in replies for i in range(tokens)]
    return {
        "train_version": version,
        "why": why,
        "group_id": numbers.randrange(1000),
        "reward": round(numbers.random(), 3),
        "temperature": 1.0,
        "num_tokens": tokens,
        "omitted_at": None,
        "token_ids": [numbers.randrange(64) for _ in own],
        "texts": [numbers.choice(_WORDS) for _ in own],
        "logprobs": [-numbers.random() if o else None for o in own],
        "versions": [max(0, version - numbers.randrange(4)) if o else -1 for o in own],
        "advantages": [numbers.gauss(0, 1) if o else None for o in own],
        "in_loss": [int(o and numbers.random() < 0.9) for o in own],
    }


def _write_trace(folder: Path, *, steps: int) -> None:
    """Write a learner, an engine and eight slots as ``metrics.trace`` does."""
    folder.mkdir()
    header = {"trace": 1, "clock": "a", "wall_s": 1.7e9, "monotonic_s": 1000.0}
    lanes = [("learner", "rank 0"), ("engine", "engine")]
    lanes += [("slot", f"slot {i}") for i in range(8)]
    micros = round(SECONDS_PER_STEP * 1e6)
    with open(folder / "all.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({**header, "process": "all"}) + "\n")
        for number, (role, name) in enumerate(lanes):
            file.write(json.dumps(["L", number, role, name, []]) + "\n")
        for step in range(steps):
            start = step * micros
            events: list[list[Any]] = [
                ["X", 0, "wait", start, micros // 4],
                ["X", 0, "train", start + micros // 4, micros // 2],
                ["F", 0, "made", start + 3 * micros // 4, step + 1, ""],
                ["X", 1, "decode", start, micros - 2000],
                ["X", 1, "swap", start + micros - 2000, 2000, {"version": step + 1}],
                ["F", 1, "loaded", start + micros, step + 1, "engine"],
            ]
            events += [["X", 2 + i, "generate", start, micros // 2] for i in range(8)]
            file.write("".join(json.dumps(event) + "\n" for event in events))
