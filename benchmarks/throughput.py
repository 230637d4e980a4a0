"""How does a cluster's shape decide what is trained per second, and what does our own code cost?

Engines and learner are simulated: they take given times; coordinator, admission, buffer, actors,
environments, publisher and metrics are those of every run.

* Rows: one to several actors, each with an engine, synchronous (``staleness.max=0``), one step off
  (1) and fully asynchronous (4).
* ``machinery_us_per_trajectory``: processor time of a run for each trajectory while engines and
  learner cost nothing, for 10, 100 and 1,000 episodes at a time; see ``machinery.py``.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --machinery-only
    python benchmarks/throughput.py --trace FILE     # lines of {"tokens": …, "latency_s": …}
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from machinery import GROUP_SIZE, flat_figures, measure_machinery
from report import argument_parser, finish
from run_once import Run, run_once

TURNS = 3
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
    counts = (2,) if arguments.quick else tuple(arguments.actors)
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


def run_shapes(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Do and print all rows."""
    print(
        f"{'':<34}{'tokens/s':>10}{'traj/s':>9}{'learner idle':>14}{'engine idle':>13}"
        f"{'staleness':>11}"
    )
    rows = []
    for shape in shapes(arguments):
        seconds = seconds_of(shape, quick=arguments.quick)
        rows.append(run_shape(shape, folder, seconds=seconds))
        print_row(rows[-1])
    return rows


def print_cost(cost: dict[str, Any]) -> None:
    print(
        f"{cost['concurrent']:>5} episodes at a time: "
        f"{cost['machinery_us_per_trajectory']:.0f} us of processor time per trajectory "
        f"(quartiles {cost['interquartile_range']:.0%} apart), "
        f"at {cost['trajectories_per_s']:.0f} trajectories/s",
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
    parser.add_argument("--machinery-only", action="store_true", help="no rows")
    arguments = parser.parse_args()
    quick = arguments.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [] if arguments.machinery_only else run_shapes(arguments, folder)
        costs = measure_machinery(
            (10, 100) if quick else (10, 100, 1000),
            folder,
            span_s=2.0 if quick else 5.0,
            spans=3 if quick else 8,
            rounds=1 if quick else 3,
            pilot=not quick,
        )
    for cost in costs:
        print_cost(cost)
    machinery, misses = flat_figures(costs)
    figures = {
        **({"rows": rows, "speedup": compare(rows)} if rows else {}),
        **machinery,
    }
    finish("throughput", figures, misses if not quick else [], started, arguments.output)


if __name__ == "__main__":
    main()
