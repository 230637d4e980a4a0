"""How stale may data be, with which correction: methods by exact lags by seeds, with pictures.

Every run is one of ``launchers/sweeps/lab_staleness.yaml``: the same game, rates and steps for
all methods, in which every trained token is exactly ``lag`` policy versions old (after the first
``lag`` steps, for which there are no older versions). Reward is that of the last policy, played
greedily on held-out tasks; intervals are Student's at 95 % over seeds.

The sweep is resumable: every finished run is in ``--folder``, and the same command goes on where a
slice of time has ended. Pictures and thinned rows go to ``--pictures``; a new folder begins with
the runs that are there.

    python benchmarks/staleness.py --slice-minutes 45 \
        --output benchmarks/results/staleness/staleness.json
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import argument_parser, commit, finish

from skyrl_async.sweep.cell import identity, resolve
from skyrl_async.sweep.grid import Block, Sweep, read_sweep
from skyrl_async.sweep.pictures import draw_all
from skyrl_async.sweep.rows import ROWS, Row, append_row, read_rows, thinned
from skyrl_async.sweep.runner import Limits, Runner
from skyrl_async.sweep.statistics import Summary, as_rows, difference, summarize

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "launchers" / "sweeps" / "lab_staleness.yaml"
FOLDER = ROOT / "runs" / "staleness_lab"
PICTURES = ROOT / "benchmarks" / "results" / "staleness"
MAX_SLICE_MINUTES = 45.0
LAG = 8
"""At which methods are judged."""
UNCORRECTED = ("ppo_behavior", "ppo_recomputed")
MIN_FALL = 0.2
"""Share of its on-policy reward that an uncorrected method loses at least."""
DRAWN_LAGS = (0, LAG)
TABLE = "table.md"
LEGEND = "Greedy reward of the last policy: mean ± half of the 95 % interval (seeds)."

QUICK_BLOCK = Block(
    values={"method": ["ppo_recomputed", "decoupled", "gspo"], "lag": [0, LAG], "seed": [0, 1]},
    overrides=("run.steps=200",),
)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--slice-minutes", type=_minutes, default=MAX_SLICE_MINUTES)
    parser.add_argument("--folder", type=Path, help=f"of the sweep; {FOLDER.relative_to(ROOT)}")
    parser.add_argument("--pictures", type=Path, help=f"{PICTURES.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--pause-while", type=Path, help="start no run while this file exists")
    parser.add_argument("--draw-only", action="store_true", help="run nothing, use what is there")
    parser.add_argument("--note", default="", help="what to remember, such as: machine shared")
    return parser.parse_args()


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= MAX_SLICE_MINUTES:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0, at most {MAX_SLICE_MINUTES:g}")
    return minutes


def sweep_of(quick: bool) -> Sweep:
    """Return the grid of the lab, or its small one."""
    sweep = read_sweep(SWEEP)
    if not quick:
        return sweep
    return Sweep(
        blocks=(QUICK_BLOCK,), config=sweep.config, overrides=sweep.overrides, axes=sweep.axes
    )


def missing(sweep: Sweep, rows: Sequence[Row]) -> int:
    """Return how many runs of a sweep have no row."""
    known = {row.digest for row in rows}
    return sum(identity(resolve(cell, sweep.config)) not in known for cell in sweep.cells())


def run(sweep: Sweep, folder: Path, arguments: argparse.Namespace, known: Path) -> None:
    """Run what is missing, as far as the time goes; ``known`` is a file of earlier rows."""
    if known.exists() and not (folder / ROWS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known, folder / ROWS)
    runner = Runner(
        sweep.cells(),
        config=sweep.config,
        folder=folder,
        limits=Limits(
            jobs=arguments.jobs,
            max_seconds=60 * arguments.slice_minutes,
            pause_while=arguments.pause_while,
        ),
        commit=commit(),
        report=lambda line: print(line, flush=True),
    )
    runner.run()


def table_of(summaries: Sequence[Summary]) -> str:
    """Return Markdown with a line for each method and length of run, and lags in columns."""
    lags = sorted({s.lag for s in summaries})
    lines = sorted({(s.steps, s.method) for s in summaries})
    table = ["| method | steps | " + " | ".join(f"lag {lag}" for lag in lags) + " |"]
    table.append("|---|---|" + "---|" * len(lags))
    for steps, method in lines:
        cells = []
        for lag in lags:
            found = [s for s in summaries if (s.steps, s.method, s.lag) == (steps, method, lag)]
            cells.append(_cell(found[0]) if found else "")
        table.append(f"| `{method}` | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def _cell(summary: Summary) -> str:
    reward = summary.reward
    width = f" ± {reward.high - reward.mean:.2f}" if reward.count > 1 else ""
    lost = f", {summary.collapsed} collapsed" if summary.collapsed else ""
    return f"{reward.mean:.2f}{width} ({reward.count}{lost})"


def judge(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return for each method what lag 8 costs against its own on-policy runs."""
    verdicts: dict[str, dict[str, Any]] = {}
    for method in sorted({str(row.cell["method"]) for row in rows}):
        stale, fresh = (rewards_of(rows, method, lag) for lag in (LAG, 0))
        if min(len(stale), len(fresh)) < 2:
            continue
        change = difference(stale, fresh)
        fresh_mean = sum(fresh) / len(fresh)
        verdicts[method] = {
            "on_policy": fresh_mean,
            "stale": sum(stale) / len(stale),
            "change": asdict(change),
            "fall": -change.mean / fresh_mean if fresh_mean else 0.0,
        }
    return verdicts


def rewards_of(rows: Sequence[Row], method: str, lag: int) -> list[float]:
    """Return the rewards of a method's shorter runs at a lag."""
    shortest = min(int(row.config["run"]["steps"]) for row in rows)
    return [
        float(row.reward)
        for row in rows
        if row.reward is not None
        and (row.cell["method"], row.cell["lag"]) == (method, lag)
        and int(row.config["run"]["steps"]) == shortest
    ]


def misses_of(verdicts: dict[str, dict[str, Any]]) -> list[str]:
    """Return one sentence for each part of the expected shape that the runs do not show."""
    misses = []
    corrected = {m: v for m, v in verdicts.items() if m not in UNCORRECTED}
    as_good = [m for m, v in corrected.items() if v["change"]["high"] >= 0]
    if not as_good:
        misses.append(f"no corrected method is as good at lag {LAG} as on-policy")
    fallen = [m for m in UNCORRECTED if verdicts.get(m, {"fall": 0.0})["fall"] >= MIN_FALL]
    if not fallen:
        misses.append(f"no uncorrected method loses {MIN_FALL:.0%} of its reward at lag {LAG}")
    return misses


def figures_of(rows: Sequence[Row], summaries: Sequence[Summary]) -> dict[str, Any]:
    return {
        "table": as_rows(rows),
        "summaries": [asdict(summary) for summary in summaries],
        "verdicts": judge(rows),
        "collapse": "mean reward of the last 10 steps below half of the best such mean",
    }


def keep_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write the rows with thinned series, in place of older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROWS).unlink(missing_ok=True)
    for row in rows:
        append_row(folder, thinned(row))


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    name = "_quick" if arguments.quick else ""
    folder = arguments.folder or FOLDER.with_name(FOLDER.name + name)
    pictures = arguments.pictures or PICTURES.with_name(PICTURES.name + name)
    sweep = sweep_of(arguments.quick)
    if not arguments.draw_only:
        run(sweep, folder, arguments, pictures / ROWS)
    rows = read_rows(folder)
    left = missing(sweep, rows)
    summaries = summarize(rows)
    table = table_of(summaries)
    print(table)
    keep_rows(rows, pictures)
    (pictures / TABLE).write_text(f"{LEGEND}\n\n{table}\n")
    files = draw_all(rows, summaries, pictures, lags=DRAWN_LAGS)
    figures = figures_of(rows, summaries)
    figures["pictures"] = [
        str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT)
    ]
    figures |= {"runs_left": left, "note": arguments.note}
    misses = misses_of(figures["verdicts"])
    if left:
        misses.append(f"{left} runs are left; the same command goes on")
    finish("staleness", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
