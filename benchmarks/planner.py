"""How well does the planner predict real runs?

Two runs are measured, one with simulated and one with embedded engines. From their costs, and from
the configuration of six other runs (other bounds and rules, group sizes, actors, tool latencies,
lengths), the planner predicts each; then each is done several times. The learner of the embedded
runs trains for real; reply lengths of its policy are taken from the run that was measured.

    python benchmarks/planner.py --rows /tmp/rows.jsonl --output benchmarks/results/planner.json

Besides, published ratios of asynchronous over synchronous training are compared with the planner's,
from assumed figures: a check of their size, no more.

Finished runs are kept in ``--rows``, so that an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from published_speedups import PUBLISHED, compare_published
from report import argument_parser, finish
from run_once import Run, run_once

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.distribution import parse_distribution
from skyrl_async.plan.calibration import Calibration, calibrate, scenario_of
from skyrl_async.plan.episodes import DrawnEpisodes
from skyrl_async.plan.simulation import Simulation

MAX_ERROR = 0.10
MAX_STALENESS_ERROR = 0.5
REPEATS = 3
SECONDS = 10
ENVIRONMENT = "skyrl_async.environments.slow_tool:SlowTool"
COMMON = (
    "run.steps=1000000",
    "evaluation.num_tasks=0",
    "checkpoint.every_steps=0",
    "logging.samples_every_steps=0",
    f"environment.name={ENVIRONMENT}",
    "environment.max_turns=16",
)
SIMULATED = (
    "runtime=local",
    "simulate.engine=true",
    "simulate.learner=true",
    "simulate.decode_step_s=0.004",
    "simulate.decode_step_s_per_sequence=2e-5",
    "simulate.prefill_s_per_token=1e-5",
    "simulate.swap_stall_s=0.003",
    "simulate.load_s=0.01",
    "simulate.step_s=0.02",
    "simulate.step_s_per_token=1e-5",
    "engine.context_length=1024",
    "sampling.max_tokens=128",
    "engine.max_concurrent=128",
)
EMBEDDED = ("runtime=ray", "optimizer.learning_rate=1e-7", "sampling.max_tokens=8")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One run.

    Attributes:
        name: of its row.
        kind: ``simulated`` or ``embedded``.
        overrides: of the configuration.
    """

    name: str
    kind: str
    overrides: tuple[str, ...]


def shape(name: str, kind: str, *, latency: str, turns: str = "fixed:3", **keys: Any) -> Shape:
    """Return a shape; ``learner__groups_per_step=8`` stands for that key."""
    overrides = (
        f"environment.options.latency_s={latency}",
        f"environment.options.turns={turns}",
        *(f"{key.replace('__', '.')}={value}" for key, value in keys.items()),
    )
    return Shape(name=name, kind=kind, overrides=overrides)


MEASURED = (
    shape(
        "measured, simulated",
        "simulated",
        latency="fixed:0.03",
        turns="fixed:2",
        simulate__reply_tokens="lognormal:16,0.8",
        staleness__max=2,
        learner__groups_per_step=12,
        rollout__group_size=8,
    ),
    shape(
        "measured, embedded",
        "embedded",
        latency="fixed:0.12",
        turns="fixed:2",
        staleness__max=2,
        learner__groups_per_step=8,
        rollout__group_size=8,
    ),
)
PREDICTED = (
    shape(
        "synchronous",
        "simulated",
        latency="lognormal:0.02,0.7",
        simulate__reply_tokens="lognormal:8,0.7",
        staleness__max=0,
        learner__groups_per_step=16,
        rollout__group_size=8,
    ),
    shape(
        "two actors, K=1",
        "simulated",
        latency="fixed:0.02",
        simulate__reply_tokens="fixed:10",
        staleness__max=1,
        rollout__num_actors=2,
        learner__groups_per_step=16,
        rollout__group_size=4,
    ),
    shape(
        "long replies, K=4",
        "simulated",
        latency="lognormal:0.1,1.0",
        simulate__reply_tokens="lognormal:32,1.0",
        staleness__max=4,
        learner__groups_per_step=8,
        rollout__group_size=8,
    ),
    shape(
        "pace, K=2",
        "simulated",
        latency="exponential:0.05",
        turns="uniform:1,5",
        simulate__reply_tokens="lognormal:8,0.5",
        staleness__max=2,
        staleness__rule="pace",
        learner__groups_per_step=16,
        rollout__group_size=4,
    ),
    shape(
        "embedded, K=1",
        "embedded",
        latency="lognormal:0.1,1.0",
        staleness__max=1,
        learner__groups_per_step=8,
        rollout__group_size=8,
    ),
    shape(
        "embedded, K=4",
        "embedded",
        latency="lognormal:0.2,0.5",
        turns="fixed:4",
        staleness__max=4,
        learner__groups_per_step=8,
        rollout__group_size=4,
    ),
)


def overrides(one: Shape, *, seconds: float) -> tuple[str, ...]:
    kind = SIMULATED if one.kind == "simulated" else EMBEDDED
    return (*COMMON, *kind, *one.overrides, f"run.max_seconds={seconds}")


def figures_of(done: Run, config: Config) -> dict[str, float]:
    """Return trained trajectories per second and mean staleness, without the first quarter."""
    first, *rows = done.metrics[len(done.metrics) // 4 :]
    per_step = config.learner.groups_per_step * config.rollout.group_size
    return {
        "trajectories_per_s": len(rows) * per_step / (rows[-1]["time_s"] - first["time_s"]),
        "staleness": statistics.fmean(row["staleness/mean"] for row in rows),
        "learner_idle": share(first, rows, "idle/learner/wait_fraction"),
        "engine_idle": share(first, rows, "idle/engine/idle_fraction"),
        "steps": len(done.metrics),
    }


def share(first: dict[str, Any], rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean of a share of time; a step may come without news of an actor."""
    spans = [row["time_s"] - before["time_s"] for before, row in pairwise([first, *rows])]
    known = [(row[name], span) for row, span in zip(rows, spans, strict=True) if name in row]
    return sum(value * span for value, span in known) / sum(span for _, span in known)


def predict(config: Config, place: Path, *, lengths: Path) -> dict[str, float]:
    """Return what the planner says about a configuration, from the costs of the run in ``place``.

    Taken from that run are all costs, the tokens of prompts and, for embedded engines, reply
    lengths; from the configuration all distributions, sizes and rules.
    """
    measured = calibrate(place)
    options = load_config(place / "config.yaml").environment.options
    first_s, answer_s = overheads(measured, parse_distribution(options["latency_s"]).mean)
    simulated = config.simulate.engine
    options = config.environment.options
    episodes = DrawnEpisodes(
        turns=options["turns"],
        reply_tokens=config.simulate.reply_tokens if simulated else f"trace:{lengths},tokens",
        waits_s=options["latency_s"],
        max_tokens=config.sampling.max_tokens,
    )
    costs = measured.scenario.costs
    scenario = scenario_of(
        config,
        replace(
            costs,
            engine=replace(costs.engine, max_concurrent=config.engine.max_concurrent),
            turn_s=costs.turn_s + answer_s,
            episode_s=first_s,
        ),
        observed=measured.scenario.observation_tokens,
    )
    said = Simulation(replace(scenario, steps=150, warmup_steps=20), episodes).run()
    per_step = scenario.groups_per_step * scenario.group_size
    return {
        "trajectories_per_s": said.steps_per_s * per_step,
        "staleness": said.staleness_mean,
        "learner_idle": said.learner_idle_fraction,
        "engine_idle": said.engine_idle_fraction,
    }


def overheads(measured: Calibration, latency_s: float) -> tuple[float, float]:
    """Return what an environment takes beyond its latency: before a prompt and for an answer."""
    waits = [wait for episode in measured.episodes for wait in episode.waits_s]
    first = statistics.fmean(episode.first_wait_s for episode in measured.episodes)
    return first, max(0.0, statistics.fmean(waits) - latency_s)


def measure(one: Shape, folder: Path, *, seconds: float) -> tuple[dict[str, float], Path]:
    """Do one run; return its figures and its folder."""
    place = folder / f"{one.name.replace(' ', '_').replace(',', '')}-{time.monotonic_ns()}"
    done = run_once(place, *overrides(one, seconds=seconds))
    return figures_of(done, load_config(place / "config.yaml")), place


def compared(one: Shape, said: dict[str, float], runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return a row of the result."""
    rates = [run["trajectories_per_s"] for run in runs]
    rate, stale = statistics.fmean(rates), statistics.fmean(run["staleness"] for run in runs)
    return {
        "name": one.name,
        "kind": one.kind,
        "overrides": list(one.overrides),
        "predicted": said,
        "trajectories_per_s": rate,
        "interval": (max(rates) - min(rates)) / rate,
        "staleness": stale,
        "learner_idle": statistics.fmean(run["learner_idle"] for run in runs),
        "engine_idle": statistics.fmean(run["engine_idle"] for run in runs),
        "throughput_error": said["trajectories_per_s"] / rate - 1,
        "staleness_error": said["staleness"] - stale,
        "runs": runs,
    }


def missed(row: dict[str, Any]) -> list[str]:
    out = []
    allowed = max(MAX_ERROR, row["interval"])
    if abs(row["throughput_error"]) > allowed:
        out.append(f"{row['name']}: throughput {row['throughput_error']:+.1%}, not {allowed:.0%}")
    if abs(row["staleness_error"]) > MAX_STALENESS_ERROR:
        out.append(f"{row['name']}: staleness {row['staleness_error']:+.2f}")
    return out


class Rows:
    """Figures by name in a file of JSON lines, so that nothing is measured twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = [json.loads(line) for line in lines]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a name."""
        return [row for row in self._rows if row["name"] == name]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self._rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measured_run(one: Shape, folder: Path, rows: Rows, *, seconds: float) -> Path:
    """Return the folder of a run to measure costs in, doing it if need be."""
    for row in rows.of(one.name):
        if Path(row["folder"]).exists():
            return Path(row["folder"])
    _, place = measure(one, folder, seconds=seconds)
    rows.add({"name": one.name, "folder": str(place)})
    return place


def write_lengths(measured: Calibration, path: Path) -> None:
    tokens = [count for episode in measured.episodes for count in episode.reply_tokens]
    path.write_text("".join(json.dumps({"tokens": count}) + "\n" for count in tokens))


def main() -> None:
    started = time.perf_counter()
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=Path, help="keep finished runs here, and go on from them")
    parser.add_argument("--only", choices=("simulated", "embedded"), help="runs of this kind")
    arguments = parser.parse_args()
    quick = arguments.quick
    kinds = ("simulated",) if quick else ("simulated", "embedded")
    kinds = (arguments.only,) if arguments.only else kinds
    seconds, repeats = (4, 1) if quick else (SECONDS, REPEATS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.rows is not None:
            folder = arguments.rows.with_suffix(".runs")
            folder.mkdir(exist_ok=True)
        rows = Rows(arguments.rows or folder / "rows.jsonl")
        results = []
        print(
            f"{'':<20}{'traj/s':>9}{'predicted':>11}{'error':>8}{'interval':>10}{'staleness':>11}"
            f"{'predicted':>11}{'learner idle':>14}{'predicted':>11}"
        )
        for kind in kinds:
            source = next(one for one in MEASURED if one.kind == kind)
            place = measured_run(source, folder, rows, seconds=seconds)
            lengths = folder / f"{kind}_lengths.jsonl"
            write_lengths(calibrate(place), lengths)
            for one in PREDICTED:
                if one.kind != kind:
                    continue
                config = load_config(None, overrides(one, seconds=seconds))
                said = predict(config, place, lengths=lengths)
                while len(rows.of(one.name)) < repeats:
                    figures, _ = measure(one, folder, seconds=seconds)
                    rows.add({"name": one.name, **figures})
                results.append(compared(one, said, rows.of(one.name)))
                print_row(results[-1])
    published = [] if quick else [compare_published(one) for one in PUBLISHED]
    for row in published:
        print(
            f"{row['name']:<44} asynchronous over synchronous: planned {row['planned']:.2f}, "
            f"published {row['published']}; {row['seconds']:.0f} s for {row['splits_tried']} splits"
        )
    report = {
        "throughput_error": {row["name"]: row["throughput_error"] for row in results},
        "staleness_error": {row["name"]: row["staleness_error"] for row in results},
        "measured": {one.kind: list(one.overrides) for one in MEASURED},
        "rows": results,
        "published": published,
    }
    misses = [miss for row in results for miss in missed(row)]
    finish("planner", report, [] if quick else misses, started, arguments.output)


def print_row(row: dict[str, Any]) -> None:
    said = row["predicted"]
    print(
        f"{row['name']:<20}{row['trajectories_per_s']:>9.1f}{said['trajectories_per_s']:>11.1f}"
        f"{row['throughput_error']:>+8.1%}{row['interval']:>10.1%}{row['staleness']:>11.2f}"
        f"{said['staleness']:>11.2f}{row['learner_idle']:>14.2f}{said['learner_idle']:>11.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
