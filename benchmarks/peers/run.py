"""Other trainers beside ours, on one task, in turns: seconds to reward and trajectories per second.

The task, the sides' settings and the clocks are those of ``benchmarks/single_turn.py``, which does
the runs. A trainer that does not run on this machine is listed with its last line of error.

    benchmarks/peers/install.sh trl DIR
    python benchmarks/peers/run.py --trl-python DIR/bin/python
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import argument_parser, finish
from single_turn import first_tasks

HERE = Path(__file__).resolve().parent
FIGURES = ("seconds_to_reward_0_9", "seconds_to_reward_0_9_over_8_steps", "trajectories_per_s")


def side_by_side(python: Path, seeds: int, steps: int) -> dict[str, Any]:
    """Run ours and synchronous TRL in turns; return the object that single_turn.py prints."""
    command = [sys.executable, str(HERE.parent / "single_turn.py"), "--trl-python", str(python)]
    command += ["--seeds", str(seeds), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def try_async(python: Path) -> str | None:
    """Start TRL's asynchronous GRPO; return its last line of error, None if it runs."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.json"
        tasks.write_text(json.dumps(first_tasks(0, 32)))
        done = subprocess.run(
            [str(python), str(HERE / "trl_async.py"), "--tasks", str(tasks)],
            env={**os.environ, "CI": "true"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def main() -> None:
    started = time.perf_counter()
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--trl-python", type=Path, required=True, help="interpreter with trl")
    parser.add_argument("--seeds", type=int, help="default 3, quick: 1")
    parser.add_argument("--steps", type=int, help="default 120, quick: 40")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 3)
    steps = args.steps or (40 if args.quick else 120)
    both = side_by_side(args.trl_python, seeds, steps)
    error = try_async(args.trl_python)
    rows: dict[str, Any] = {
        "ours": {**{k: both[k] for k in FIGURES}, "staleness_max": both["staleness_max"]},
        "TRL GRPOTrainer": {k: both["trl"][k] for k in FIGURES},
        "TRL AsyncGRPOTrainer": {"error": error},
    }
    print(f"{'':<24}{'traj/s':>9}{'s to 0.9':>10}{'over 8 steps':>14}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:<24}does not run here: {row['error']}")
            continue
        cells = [row["trajectories_per_s"], row[FIGURES[0]], row[FIGURES[1]]]
        text = [("-" if c is None else f"{c:.1f}") for c in cells]
        print(f"{name:<24}{text[0]:>9}{text[1]:>10}{text[2]:>14}")
    figures = {
        "rows": rows,
        "versions": both["trl"]["runs"][0]["versions"],
        "seeds": seeds,
        "steps": steps,
        "throughput_ratio": both["trajectories_per_s"] / both["trl"]["trajectories_per_s"],
    }
    finish("peers", figures, both["misses"], started, args.output)


if __name__ == "__main__":
    main()
