"""Every algorithm preset on the default game with staleness of up to 8 versions.

Each row is a real run of ``launchers/run.py algorithm=NAME`` on ``number_guess`` (1 to 10, six
guesses), all with the same seed, rate and number of steps. ``reward`` is of the last greedy
evaluation on held-out tasks, ``best`` of the best one, ``seconds`` the time until one reached 0.95,
``ess`` the mean effective sample fraction over the run.

One seed and one rate for all says which presets work as they are, not which algorithm is best.

    python benchmarks/presets.py --output benchmarks/results/presets.json
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

from skyrl_async.config_loading import PRESETS

ROOT = Path(__file__).resolve().parents[1]
STALENESS, STEPS, RATE = 8, 200, 1e-3
REWARD = 0.95
QUICK = ("dapo", "gspo")


def run(preset: str, *, steps: int, folder: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    place = folder / preset
    command = [
        *(sys.executable, str(ROOT / "launchers" / "run.py"), f"run.dir={place}"),
        f"algorithm={preset}",
        f"run.steps={steps}",
        f"staleness.max={STALENESS}",
        f"optimizer.learning_rate={RATE}",
        "runtime=local",
        "evaluation.every_steps=20",
        "logging.tensorboard=false",
        "logging.console=plain",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{preset} failed:\n{done.stdout}\n{done.stderr}")
    metrics = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((place / "summary.json").read_text())
    evaluations = [m for m in metrics if m.get("eval/reward_mean") is not None]
    reached = [m["time_s"] for m in evaluations if m["eval/reward_mean"] >= REWARD]
    last = summary["eval_reward_final"]
    ess = [m["offpolicy/ess_fraction"] for m in metrics if "offpolicy/ess_fraction" in m]
    return {
        "preset": preset,
        "reward": last,
        "best": max([last, *(m["eval/reward_mean"] for m in evaluations)]),
        "seconds_to_reward": reached[0] if reached else None,
        "seconds": summary["seconds"],
        "steps": summary["steps"],
        "ess_fraction": sum(ess) / len(ess),
        "staleness_observed_max": summary["staleness_observed_max"],
        "dropped": summary["dropped"],
    }


def main() -> None:
    arguments = parse_args(__doc__ or "")
    started = time.perf_counter()
    names = QUICK if arguments.quick else sorted(p.stem for p in PRESETS.glob("*.yaml"))
    steps = 30 if arguments.quick else STEPS
    print(f"{'':<22}{'reward':>8}{'best':>7}{'s to 0.95':>11}{'seconds':>9}{'ess':>7}{'stale':>7}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for preset in names:
            row = run(preset, steps=steps, folder=Path(name))
            rows.append(row)
            reached = row["seconds_to_reward"]
            print(
                f"{preset:<22}{row['reward']:>8.2f}{row['best']:>7.2f}"
                f"{'-' if reached is None else f'{reached:.1f}':>11}{row['seconds']:>9.1f}"
                f"{row['ess_fraction']:>7.2f}{row['staleness_observed_max']:>7}",
                flush=True,
            )
    beyond = [r["preset"] for r in rows if r["staleness_observed_max"] > STALENESS]
    misses = [f"{name}: trained beyond the bound" for name in beyond]
    finish("presets", {"staleness_max": STALENESS, "rows": rows}, misses, started, arguments.output)


if __name__ == "__main__":
    main()
