"""How does a cluster's shape decide what is trained per second, and what does our own code cost?

Engines and learner are simulated: they take given times; coordinator, admission, buffer, actors,
environments, publisher and metrics are those of every run.

* Rows: one to several actors, each with an engine, synchronous (``staleness.max=0``), one step off
  (1) and fully asynchronous (4).
* ``machinery_us_per_trajectory``: processor time of the whole run for each trajectory, start-up
  left out, while engines and learner cost nothing, for 10 to 1,000 episodes at a time. Tools take
  proportionally longer, so that as many trajectories come per second.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --trace FILE     # lines of {"tokens": …, "latency_s": …}
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import argument_parser, finish
from run_once import Run, run_once

GROUP_SIZE, TURNS = 5, 3
TRAJECTORIES_PER_S = 200
MAX_GROWTH = 0.20
MIN_STEPS = 2
COMMON = (
    "run.steps=1000000",
    "evaluation.num_tasks=0",
    "checkpoint.every_steps=0",
    "logging.samples_every_steps=0",
    "simulate.engine=true",
    "simulate.learner=true",
    "environment.name=skyrl_async.environments.slow_tool:SlowTool",
    f"environment.options.turns=fixed:{TURNS}",
    "engine.context_length=2048",
    "sampling.max_tokens=128",
)
MODES = {0: "synchronous", 1: "one step off", 4: "asynchronous"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One run.

    Attributes:
        actors: each with an engine of its own.
        staleness_max: K.
        runtime: ``local`` or ``ray``.
        reply_tokens: a distribution.
        latency_s: of a tool, a distribution.
    """

    actors: int
    staleness_max: int
    runtime: str = "local"
    reply_tokens: str = "lognormal:16,1.0"
    latency_s: str = "lognormal:0.05,1.0"

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.actors} actors, {MODES[self.staleness_max]}, {self.runtime}"


def run_shape(shape: Shape, folder: Path, *, seconds: float) -> dict[str, Any]:
    """Do one run with as many groups a step as the actors can use; return its row."""
    groups = 8 * shape.actors
    done = run_once(
        folder / shape.name.replace(" ", "_").replace(",", ""),
        *COMMON,
        f"runtime={shape.runtime}",
        f"run.max_seconds={seconds}",
        f"rollout.num_actors={shape.actors}",
        f"rollout.group_size={GROUP_SIZE}",
        f"learner.groups_per_step={groups}",
        f"staleness.max={shape.staleness_max}",
        f"environment.options.latency_s={shape.latency_s}",
        f"simulate.reply_tokens={shape.reply_tokens}",
        "simulate.decode_step_s=0.005",
        "simulate.decode_step_s_per_sequence=2e-5",
        "simulate.prefill_s_per_token=1e-5",
        "simulate.swap_stall_s=0.005",
        "simulate.load_s=0.02",
        # The learner grows with the actors, as on a cluster.
        "simulate.step_s=0.05",
        f"simulate.step_s_per_token={3e-5 / shape.actors}",
    )
    return {"name": shape.name, **vars_of(shape), **rates(done, per_step=groups * GROUP_SIZE)}


def vars_of(shape: Shape) -> dict[str, Any]:
    return {
        "actors": shape.actors,
        "engines": shape.actors,
        "staleness_max": shape.staleness_max,
        "runtime": shape.runtime,
        "reply_tokens": shape.reply_tokens,
        "latency_s": shape.latency_s,
    }


def rates(done: Run, *, per_step: int) -> dict[str, float]:
    """Return rates and idle shares, without the first quarter of the steps.

    Raises:
        ValueError: if there were too few steps for that.
    """
    first, *rows = done.metrics[len(done.metrics) // 4 :]
    if len(rows) < MIN_STEPS:
        raise ValueError(
            f"{done.command} did {len(done.metrics)} steps; shorten replies or latencies"
        )
    seconds = rows[-1]["time_s"] - first["time_s"]
    spans = [row["time_s"] - before["time_s"] for before, row in pairwise([first, *rows])]

    def share(name: str) -> float:
        known = [(row[name], span) for row, span in zip(rows, spans, strict=True) if name in row]
        return sum(value * span for value, span in known) / sum(span for _, span in known)

    return {
        "steps": len(done.metrics),
        "tokens_per_s": sum(row["learner/loss_tokens"] for row in rows) / seconds,
        "trajectories_per_s": len(rows) * per_step / seconds,
        "learner_idle": share("idle/learner/wait_fraction"),
        "engine_idle": share("idle/engine/idle_fraction"),
        "staleness_mean": sum(row["staleness/mean"] for row in rows) / len(rows),
    }


def machinery(concurrent: int, folder: Path, *, seconds: float, runtime: str) -> dict[str, Any]:
    """Return the processor time per trajectory with so many episodes at a time."""
    batch = 10  # the smallest number of episodes at a time, so that K alone changes
    latency_s = concurrent / TRAJECTORIES_PER_S / TURNS

    def one(name: str, seconds: float) -> tuple[float, int]:
        before = _children_cpu_s()
        done = run_once(
            folder / f"machinery-{concurrent}-{name}",
            *COMMON,
            f"runtime={runtime}",
            f"run.max_seconds={seconds}",
            f"rollout.group_size={GROUP_SIZE}",
            f"learner.groups_per_step={batch // GROUP_SIZE}",
            f"staleness.max={concurrent // batch - 1}",
            f"environment.options.latency_s=fixed:{latency_s}",
            "environment.episode_timeout_s=60",
            "engine.max_concurrent=1024",
            "simulate.reply_tokens=fixed:8",
        )
        return _children_cpu_s() - before, int(done.summary["trajectories_trained"])

    # What both runs have, starting and the first episodes, is not counted.
    short_s = 1.0 + TURNS * latency_s
    short_cpu, short_count = one("short", short_s)
    long_cpu, long_count = one("long", short_s + seconds)
    count = long_count - short_count
    return {
        "concurrent": concurrent,
        "trajectories_per_s": count / seconds,
        "machinery_us_per_trajectory": 1e6 * (long_cpu - short_cpu) / count,
    }


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def shapes(arguments: argparse.Namespace) -> list[Shape]:
    """Return the rows to do."""
    options: dict[str, Any] = {}
    if arguments.trace is not None:
        options = {
            "reply_tokens": f"trace:{arguments.trace.resolve()},tokens",
            "latency_s": f"trace:{arguments.trace.resolve()},latency_s",
        }
    for name in ("reply_tokens", "latency_s"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    counts = (1, 2) if arguments.quick else tuple(arguments.actors)
    rows = [Shape(actors=n, staleness_max=k, **options) for n in counts for k in MODES]
    if arguments.ray:
        rows += [Shape(actors=2, staleness_max=k, runtime="ray", **options) for k in MODES]
    return rows


def seconds_of(shape: Shape, *, quick: bool) -> float:
    """Return how long to measure: synchronous steps are few."""
    return (4 if quick else 9) * (1 if shape.staleness_max else 1.6)


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:<34}{row['tokens_per_s']:>10,.0f}{row['trajectories_per_s']:>9.1f}"
        f"{row['learner_idle']:>14.2f}{row['engine_idle']:>13.2f}{row['staleness_mean']:>11.2f}",
        flush=True,
    )


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times the synchronous rate each mode has, by shape."""
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        base = next(
            r["tokens_per_s"]
            for r in rows
            if r["staleness_max"] == 0
            and (r["actors"], r["runtime"]) == (row["actors"], row["runtime"])
        )
        shape = f"{row['actors']} actors, {row['runtime']}"
        mode = MODES[row["staleness_max"]]
        out.setdefault(shape, {})[mode] = row["tokens_per_s"] / base
    return out


def main() -> None:
    started = time.perf_counter()
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trace", type=Path, help='lines of {"tokens": …, "latency_s": …}')
    parser.add_argument("--reply-tokens", help="a distribution, such as lognormal:16,1.0")
    parser.add_argument("--latency-s", help="of a tool: a distribution")
    parser.add_argument("--ray", action="store_true", help="also with Ray actors")
    arguments = parser.parse_args()
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(
            f"{'':<34}{'tokens/s':>10}{'traj/s':>9}{'learner idle':>14}{'engine idle':>13}"
            f"{'staleness':>11}"
        )
        rows = []
        for shape in shapes(arguments):
            rows.append(run_shape(shape, folder, seconds=seconds_of(shape, quick=quick)))
            print_row(rows[-1])
        costs = []
        for concurrent in (10, 100) if quick else (10, 100, 1000):
            costs.append(machinery(concurrent, folder, seconds=4 if quick else 12, runtime="local"))
            print(
                f"{concurrent:>5} episodes at a time: "
                f"{costs[-1]['machinery_us_per_trajectory']:.0f} us of processor time per "
                f"trajectory, at {costs[-1]['trajectories_per_s']:.0f} trajectories/s",
                flush=True,
            )
    per_trajectory = [cost["machinery_us_per_trajectory"] for cost in costs]
    growth = max(per_trajectory) / per_trajectory[0] - 1
    misses = []
    if growth > MAX_GROWTH:
        misses.append(f"machinery grows by {growth:.0%} with concurrency, not {MAX_GROWTH:.0%}")
    figures = {
        "rows": rows,
        "speedup": compare(rows),
        "machinery_us_per_trajectory": per_trajectory,
        "machinery_growth": growth,
        "machinery_spread": max(per_trajectory) / min(per_trajectory) - 1,
        "machinery": costs,
    }
    finish("throughput", figures, misses if not quick else [], started, arguments.output)


if __name__ == "__main__":
    main()
