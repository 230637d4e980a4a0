"""Asynchronous against synchronous training on three-turn tasks with slow tools.

Every row is a real run of ``launchers/run.py`` on :class:`benchmarks.environments.SlowGuess`: 16
groups of 8 trajectories a step, tool latency lognormal with mean 50 ms and sigma 1, the learning
rate of both from a grid (``--tune`` runs it, with short latencies). ``speedup`` is trained
trajectories per second of ``staleness.max=4`` over 0, over the second half of the steps, and
``reward`` the median of the held-out evaluations in that half; ``speedup_to_reward`` compares the
seconds until a held-out evaluation reaches 0.95. Speeds and seconds are medians over seeds, rewards
are of the worst seed. ``ideal_speedup`` is what the asynchronous run would reach if the busier one
of learner and engine were never idle, by its ledger of wall time.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from report import argument_parser, finish
from run_once import Run, run_once

GROUPS, GROUP_SIZE = 16, 8
REWARD = 0.95
TARGET_SPEEDUP = 2.5
SEEDS = (0, 1, 2)
LEARNING_RATES = {"sync": 4e-3, "async": 5e-4}
GRID = (5e-4, 1e-3, 2e-3, 4e-3)
STEPS = {"sync": 60, "async": 320}
TUNING_LATENCY_MEAN_S = 0.002
"""The rate is chosen by steps to the reward, which do not depend on how long the tools take."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration.

    Attributes:
        name: for the table.
        staleness_max: K.
        groups_per_step: B.
        learning_rate: of AdamW.
        steps: learner steps.
        latency_mean_s: of a tool.
        seed: of the run.
    """

    name: str
    staleness_max: int
    learning_rate: float
    steps: int
    groups_per_step: int = GROUPS
    latency_mean_s: float = 0.05
    seed: int = 0


def run(row: Row, *, runtime: str, folder: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    done = run_once(
        folder / row.name.replace(" ", "_").replace("=", ""),
        f"runtime={runtime}",
        f"run.steps={row.steps}",
        f"staleness.max={row.staleness_max}",
        f"optimizer.learning_rate={row.learning_rate}",
        # Division by the standard deviation leaves some runs of K=4 one number short of all.
        "algorithm.advantage=mean_centered",
        f"learner.groups_per_step={row.groups_per_step}",
        f"rollout.group_size={GROUP_SIZE}",
        f"seed={row.seed}",
        "environment.name=benchmarks.environments:SlowGuess",
        f"environment.options.latency_mean_s={row.latency_mean_s}",
        "environment.max_turns=3",
        "engine.max_concurrent=1024",
        f"evaluation.every_steps={max(1, row.steps // 24)}",
    )
    return row_of(row, done)


def row_of(row: Row, done: Run) -> dict[str, Any]:
    """Return a row of the table; rates are over the second half of the steps."""
    half = replace(done, metrics=done.metrics[len(done.metrics) // 2 :])
    start, *later = half.metrics
    seconds = later[-1]["time_s"] - start["time_s"]
    rate = len(later) / seconds * row.groups_per_step * GROUP_SIZE
    # A step may come without news of an actor.
    waiting = replace(half, metrics=later).mean("idle/learner/wait_fraction")
    idle = replace(half, metrics=later).mean("idle/engine/idle_fraction")
    seconds_to_reward, steps_to_reward = done.reached(REWARD) or (None, None)
    return {
        "name": row.name,
        "staleness_max": row.staleness_max,
        "learning_rate": row.learning_rate,
        "trajectories_per_s": rate,
        "learner_wait_fraction": waiting,
        "engine_idle_fraction": idle,
        "ideal_trajectories_per_s": rate / (1 - min(waiting, idle)),
        "seconds_to_reward": seconds_to_reward,
        "steps_to_reward": steps_to_reward,
        # One greedy evaluation says little: where two replies are about as likely, a step turns it
        # over.
        "reward": statistics.median(reward for _, _, reward in half.evaluations),
        "reward_last": done.summary["eval_reward_final"],
        "staleness_observed_max": done.summary["staleness_observed_max"],
    }


def rows(*, quick: bool) -> list[Row]:
    sync, asynchronous = LEARNING_RATES["sync"], LEARNING_RATES["async"]
    if quick:
        return [
            Row(name="K=0", staleness_max=0, learning_rate=sync, steps=12),
            Row(name="K=4", staleness_max=4, learning_rate=asynchronous, steps=40),
        ]
    return [
        *(
            Row(
                name=f"K={k} seed {seed}",
                staleness_max=k,
                learning_rate=LEARNING_RATES[kind],
                steps=STEPS[kind],
                seed=seed,
            )
            for k, kind in ((0, "sync"), (4, "async"))
            for seed in SEEDS
        ),
        Row(name="K=1", staleness_max=1, learning_rate=asynchronous, steps=STEPS["async"] // 2),
        Row(
            name="K=0 at equal concurrency",
            staleness_max=0,
            learning_rate=sync,
            steps=20,
            groups_per_step=5 * GROUPS,
        ),
    ]


def tune(*, runtime: str, folder: Path) -> None:
    """Print a row for every learning rate of the grid, synchronous and asynchronous."""
    print_header()
    for k, kind in ((4, "async"), (0, "sync")):
        for rate in GRID:
            for seed in SEEDS:
                row = Row(
                    name=f"K={k} rate={rate:g} seed={seed}",
                    staleness_max=k,
                    learning_rate=rate,
                    steps=STEPS[kind],
                    latency_mean_s=TUNING_LATENCY_MEAN_S,
                    seed=seed,
                )
                print_row(run(row, runtime=runtime, folder=folder))


def print_header() -> None:
    print(
        f"{'':<26}{'traj/s':>9}{'ideal':>9}{'wait':>7}{'idle':>7}{'s to 0.95':>11}{'steps':>7}"
        f"{'reward':>8}"
    )


def print_row(r: dict[str, Any]) -> None:
    reached = r["seconds_to_reward"]
    print(
        f"{r['name']:<26}{r['trajectories_per_s']:>9.0f}{r['ideal_trajectories_per_s']:>9.0f}"
        f"{r['learner_wait_fraction']:>7.2f}{r['engine_idle_fraction']:>7.2f}"
        f"{'-' if reached is None else f'{reached:.1f}':>11}{r['steps_to_reward'] or '-':>7}"
        f"{r['reward']:>8.2f}",
        flush=True,
    )


def compare(
    results: list[dict[str, Any]], *, quick: bool
) -> tuple[dict[str, float | None], list[str]]:
    """Return the summary over the seeds, and what misses its target."""
    sync = [r for r in results if r["name"].startswith("K=0") and "equal" not in r["name"]]
    fast = [r for r in results if r["name"].startswith("K=4")]

    def median(rs: list[dict[str, Any]], name: str) -> float | None:
        values = [math.inf if r[name] is None else r[name] for r in rs]
        middle = statistics.median(values)
        return None if math.isinf(middle) else middle

    rate, fast_rate = median(sync, "trajectories_per_s"), median(fast, "trajectories_per_s")
    ideal = median(fast, "ideal_trajectories_per_s")
    assert rate is not None and fast_rate is not None and ideal is not None
    seconds, fast_seconds = median(sync, "seconds_to_reward"), median(fast, "seconds_to_reward")
    summary = {
        "speedup": fast_rate / rate,
        "ideal_speedup": ideal / rate,
        "seconds_to_reward_sync": seconds,
        "seconds_to_reward_async": fast_seconds,
        "speedup_to_reward": seconds / fast_seconds if seconds and fast_seconds else None,
        "reward_sync": min(r["reward"] for r in sync),
        "reward_async": min(r["reward"] for r in fast),
    }
    misses = []
    if fast_rate / rate < TARGET_SPEEDUP:
        misses.append(f"speedup {fast_rate / rate:.2f} < {TARGET_SPEEDUP}")
    if not quick and summary["reward_async"] < max(REWARD, summary["reward_sync"] - 0.02):
        misses.append(
            f"held-out reward {summary['reward_async']:.2f}, of K=0 {summary['reward_sync']:.2f}"
        )
    return summary, misses


def main() -> None:
    started = time.perf_counter()
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--tune", action="store_true", help="try the grid of learning rates")
    arguments = parser.parse_args()
    runtime = "local" if arguments.quick else "ray"
    with tempfile.TemporaryDirectory() as name:
        if arguments.tune:
            tune(runtime=runtime, folder=Path(name))
            return
        print_header()
        results = []
        for row in rows(quick=arguments.quick):
            results.append(run(row, runtime=runtime, folder=Path(name)))
            print_row(results[-1])
    summary, misses = compare(results, quick=arguments.quick)
    figures = {"runtime": runtime, **summary, "rows": results}
    finish("async_vs_sync", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
