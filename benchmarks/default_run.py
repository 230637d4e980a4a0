"""The default run: does it learn, how fast, and how soon does it begin?

Runs ``launchers/run.py`` as it is for three seeds (with an evaluation every 20 steps), the hard
form of the game once, and a few steps with ``runtime=local`` for its start-up time.
``seconds_to_reward`` counts from the start of training to the first greedy evaluation on held-out
tasks of at least 0.95; ``seconds_to_first_step`` from the start of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import finish, parse_args

ROOT = Path(__file__).resolve().parents[1]
REWARD, TARGET_SECONDS = 0.95, 60.0
RAY_START_S, LOCAL_START_S = 20.0, 8.0
HARD = "launchers/configs/number_guess_hard_cpu.yaml"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Do one run and return its figures."""
    command = [sys.executable, str(ROOT / "launchers" / "run.py"), f"run.dir={folder}", *overrides]
    environment = {**os.environ, "CI": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = [
        (row["time_s"], row["step"])
        for row in rows
        if (row.get("eval/reward_mean") or 0.0) >= REWARD
    ]
    if not reached and (summary["eval_reward_final"] or 0.0) >= REWARD:
        reached = [(summary["seconds"], summary["steps"])]
    clipped = [row["offpolicy/clip_fraction"] for row in rows if "offpolicy/clip_fraction" in row]
    return {
        "overrides": list(overrides),
        "seconds_to_reward": reached[0][0] if reached else None,
        "steps_to_reward": reached[0][1] if reached else None,
        "eval_reward_final": summary["eval_reward_final"],
        "trajectories_trained": summary["trajectories_trained"],
        "trajectories_per_s": summary["trajectories_trained"] / summary["seconds"],
        "seconds_to_first_step": summary["startup_seconds"] + summary["seconds_to_first_step"],
        "clip_fraction": sum(clipped) / len(clipped),
        "staleness_observed_max": summary["staleness_observed_max"],
    }


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{'':<14}{'s to 0.95':>10}{'steps':>7}{'traj/s':>8}{'first step':>12}"
        f"{'clip':>8}{'eval':>6}"
    )
    for name, row in rows.items():
        seconds = row["seconds_to_reward"]
        reached = "-" if seconds is None else f"{seconds:.1f}"
        print(
            f"{name:<14}{reached:>10}{row['steps_to_reward'] or '-':>7}"
            f"{row['trajectories_per_s']:>8.0f}{row['seconds_to_first_step']:>12.1f}"
            f"{row['clip_fraction']:>8.4f}{row['eval_reward_final'] or 0:>6.2f}"
        )


def main() -> None:
    started = time.perf_counter()
    arguments = parse_args(__doc__ or "")
    seeds = (0,) if arguments.quick else (0, 1, 2)
    until = (f"run.stop_at_eval_reward={REWARD}", "evaluation.every_steps=20")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            rows[f"seed {seed}"] = run(Path(name) / f"{seed}", f"seed={seed}", *until)
        if not arguments.quick:
            rows["hard form"] = run(Path(name) / "hard", "--config", HARD, "run.steps=1500", *until)
        rows["local"] = run(
            Path(name) / "local", "runtime=local", "run.steps=3", "evaluation.num_tasks=0"
        )
    print_table(rows)
    misses = []
    for seed in seeds:
        row = rows[f"seed {seed}"]
        if row["seconds_to_reward"] is None or row["seconds_to_reward"] > TARGET_SECONDS:
            misses.append(f"seed {seed}: {row['seconds_to_reward']} s to {REWARD}, target <= 60")
        if row["clip_fraction"] <= 0:
            misses.append(f"seed {seed}: nothing was clipped")
        if row["seconds_to_first_step"] > RAY_START_S:
            misses.append(f"seed {seed}: first step after {row['seconds_to_first_step']:.1f} s")
    if rows["local"]["seconds_to_first_step"] > LOCAL_START_S:
        misses.append(f"local: first step after {rows['local']['seconds_to_first_step']:.1f} s")
    finish("default_run", {"rows": rows}, misses, started, arguments.output)


if __name__ == "__main__":
    main()
