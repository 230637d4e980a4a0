"""Every algorithm preset on the default game with staleness of up to 8 versions, by learning rate.

Each run is ``launchers/run.py algorithm=NAME`` on ``number_guess`` (1 to 10, six guesses), all with
the same seed and number of steps. The table has the best rate of each preset, by the reward of the
last greedy evaluation on held-out tasks (of equal ones the sooner at 0.95, then the shorter run),
and the others beside it. ``best`` is the best evaluation, ``s`` and ``steps to 0.95`` are the
first one that reached it, ``ess`` is the mean effective sample fraction over the run.

One seed says which presets work here and at which rate, not which algorithm is best.

With ``--output FILE`` every run is saved as soon as it is done, and those in the file are not done
again: so the benchmark can be stopped and go on, and rates and presets can be added.

    python benchmarks/presets.py --output benchmarks/results/presets.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import argument_parser, commit, finish
from run_once import run_once

from skyrl_async.config_layers import PRESETS

STALENESS, STEPS, SEED = 8, 200, 0
RATES = (1e-3, 5e-4, 2.5e-4)
REWARD = 0.95
TIMEOUT_S = 3600.0
QUICK_STEPS, QUICK_RATES, QUICK = 30, (1e-3,), ("dapo", "gspo")
NAMES = tuple(sorted(p.stem for p in PRESETS.glob("*.yaml")))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rates", type=_rates, help="learning rates, for example 1e-3,5e-4")
    parser.add_argument("--only", type=_names, help="presets, for example gspo,topr")
    parser.add_argument("--steps", type=int, help=f"learner steps of each run; {STEPS} by default")
    parser.add_argument("--note", help="what to remember with each run, such as: machine shared")
    return parser.parse_args()


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text}: rates must be above 0")
    return rates


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: one of {', '.join(NAMES)}")
    return names


def run(preset: str, rate: float, *, steps: int, folder: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    done = run_once(
        folder / f"{preset}-{rate:g}",
        f"algorithm={preset}",
        f"run.steps={steps}",
        f"staleness.max={STALENESS}",
        f"optimizer.learning_rate={rate:g}",
        f"seed={SEED}",
        "runtime=local",
        "evaluation.every_steps=20",
        timeout_s=TIMEOUT_S,
    )
    seconds, steps_to_reward = done.reached(REWARD) or (None, None)
    return {
        "preset": preset,
        "rate": rate,
        "seed": SEED,
        "reward": done.summary["eval_reward_final"],
        "best": max(reward for _, _, reward in done.evaluations),
        "rewards": [reward for _, _, reward in done.evaluations],
        "seconds_to_reward": seconds,
        "steps_to_reward": steps_to_reward,
        "seconds": done.summary["seconds"],
        "steps": done.summary["steps"],
        "ess_fraction": done.mean("offpolicy/ess_fraction"),
        "clip_fraction": done.mean("offpolicy/clip_fraction"),
        "staleness_observed_max": done.summary["staleness_observed_max"],
        "dropped": done.summary["dropped"],
        "commit": commit(),
        "command": done.command,
    }


def key(row: dict[str, Any]) -> tuple[str, float, int, int]:
    """Return what makes two rows the same run."""
    return row["preset"], row["rate"], row["seed"], row["steps"]


def saved_rows(output: Path | None) -> dict[tuple[str, float, int, int], dict[str, Any]]:
    if output is None or not output.exists():
        return {}
    return {key(row): row for row in json.loads(output.read_text())["rows"]}


def save(output: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows so far; a cut-off while writing leaves the file before."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps({"benchmark": "presets", "rows": list(rows)}) + "\n")
    part.replace(output)


def best_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of one preset, the best first."""
    return sorted(
        rows,
        key=lambda row: (-row["reward"], row["seconds_to_reward"] or math.inf, row["seconds"]),
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line of Markdown for each preset, the best preset first."""
    of_presets = {row["preset"]: [r for r in rows if r["preset"] == row["preset"]] for row in rows}
    chosen = [best_first(group) for group in of_presets.values()]
    print("| preset | rate | reward | best | s to 0.95 | steps to 0.95 | ess | other rates |")
    print("|---|---|---|---|---|---|---|---|")
    for best, *others in sorted(
        chosen, key=lambda g: (-g[0]["reward"], g[0]["steps_to_reward"] or math.inf)
    ):
        reached = best["seconds_to_reward"]
        cells = (
            f"`{best['preset']}`",
            f"{best['rate']:g}",
            f"{best['reward']:.2f}",
            f"{best['best']:.2f}",
            "-" if reached is None else f"{reached:.0f}",
            best["steps_to_reward"] or "-",
            f"{best['ess_fraction']:.2f}",
            ", ".join(f"{r['rate']:g}: {r['reward']:.2f}" for r in by_rate(others)),
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def by_rate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["rate"])


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    quick, output = arguments.quick, arguments.output
    steps = arguments.steps or (QUICK_STEPS if quick else STEPS)
    rows = saved_rows(output)
    with tempfile.TemporaryDirectory() as name:
        for rate in arguments.rates or (QUICK_RATES if quick else RATES):
            for preset in arguments.only or (QUICK if quick else NAMES):
                if (preset, rate, SEED, steps) in rows:
                    continue
                row = run(preset, rate, steps=steps, folder=Path(name))
                if arguments.note:
                    row["note"] = arguments.note
                rows[key(row)] = row
                save(output, list(rows.values()))
                print(f"{preset:<22}{rate:>9g}{row['reward']:>6.2f}", flush=True)
    print_table([row for row in rows.values() if row["steps"] == steps])
    beyond = [row for row in rows.values() if row["staleness_observed_max"] > STALENESS]
    misses = [f"{row['preset']} at {row['rate']:g}: trained beyond the bound" for row in beyond]
    figures = {"staleness_max": STALENESS, "rows": list(rows.values())}
    finish("presets", figures, misses, started, output)


if __name__ == "__main__":
    main()
