"""Does the collapse guard save a run that collapses without it?

The default game with everything against it: stale tokens of up to 8 versions without any importance
weight (``algorithm=ppo_recomputed``), at 2.5 times the default learning rate. Each seed runs twice,
without and with the guard. ``reward`` is the mean of the last quarter's greedy evaluations.

    python benchmarks/collapse_guard.py --output benchmarks/results/collapse_guard.json
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
SEEDS = (0, 1)
STEPS = 400
GUARD = (
    "guard.enabled=true",
    "guard.min_ess_fraction=0.3",
    "guard.max_kl=0.5",
    "guard.patience_steps=2",
)


def run(*overrides: str, steps: int, place: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    command = [
        *(sys.executable, str(ROOT / "launchers" / "run.py"), f"run.dir={place}"),
        *("algorithm=ppo_recomputed", "staleness.max=8", "optimizer.learning_rate=5e-3"),
        *(f"run.steps={steps}", "evaluation.every_steps=20", "runtime=local"),
        *("logging.tensorboard=false", "logging.console=plain", *overrides),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{overrides} failed:\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((place / "summary.json").read_text())
    rewards = [m["eval/reward_mean"] for m in lines if m.get("eval/reward_mean") is not None]
    last = [*rewards, summary["eval_reward_final"]][-max(1, len(rewards) // 4) :]
    return {
        "reward": sum(last) / len(last),
        "rewards": rewards,
        "guard_actions": summary["guard_actions"],
        "seconds": summary["seconds"],
    }


def main() -> None:
    arguments = parse_args(__doc__ or "")
    started = time.perf_counter()
    seeds, steps = ((0,), 60) if arguments.quick else (SEEDS, STEPS)
    rows, misses = [], []
    print(f"{'':<10}{'without':>9}{'with':>7}  actions")
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            pair = {
                kind: run(f"seed={seed}", *guard, steps=steps, place=Path(name) / f"{kind}{seed}")
                for kind, guard in (("without", ()), ("with", GUARD))
            }
            rows.append({"seed": seed, **pair})
            plain, guarded = pair["without"]["reward"], pair["with"]["reward"]
            print(
                f"seed {seed:<5}{plain:>9.2f}{guarded:>7.2f}  {pair['with']['guard_actions']}",
                flush=True,
            )
            if not arguments.quick and guarded < plain + 0.3:
                misses.append(f"seed {seed}: {guarded:.2f} with the guard, {plain:.2f} without")
    finish("collapse_guard", {"rows": rows}, misses, started, arguments.output)


if __name__ == "__main__":
    main()
