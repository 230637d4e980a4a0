"""Does the collapse guard save a run that collapses without it?

The default game with everything against it: stale tokens of up to 8 versions without any importance
weight (``algorithm=ppo_recomputed``), at 2.5 times the default learning rate. Each seed runs twice,
without and with the guard. ``reward`` is the mean of the last quarter's greedy evaluations.

    python benchmarks/collapse_guard.py --output benchmarks/results/collapse_guard.json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from report import finish, parse_args
from run_once import run_once

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
    done = run_once(
        place,
        *("algorithm=ppo_recomputed", "staleness.max=8", "optimizer.learning_rate=5e-3"),
        *(f"run.steps={steps}", "evaluation.every_steps=20", "runtime=local", *overrides),
    )
    *rewards, final = (reward for _, _, reward in done.evaluations)
    last = [*rewards, final][-max(1, len(rewards) // 4) :]
    return {
        "reward": sum(last) / len(last),
        "rewards": rewards,
        "guard_actions": done.summary["guard_actions"],
        "seconds": done.summary["seconds"],
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
