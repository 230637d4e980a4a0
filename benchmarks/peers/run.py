"""Other trainers beside ours, on one task, in turns: seconds to reward and trajectories per second.

The task, our side's settings and the clocks are those of ``benchmarks/single_turn.py``; how each
other trainer is used says its script. A trainer takes part if its interpreter is given (also
``--torchrl-python`` and ``--tunix-python``). TRL's asynchronous one does not run without CUDA: it
is started, and listed with its last line of error.

    for name in trl torchrl tunix; do benchmarks/peers/install.sh $name DIR/$name; done
    python benchmarks/peers/run.py --trl-python DIR/trl/bin/python

A trainer trains for ``--max-seconds`` at most, whatever it has reached by then. All figures are
medians over the seeds; a missing time means that at least half of the seeds did not get there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import argument_parser, finish
from single_turn import first_tasks, headline, run_ours, run_peer

HERE = Path(__file__).resolve().parent
SECONDS, SECONDS_OVER_8 = "seconds_to_reward_0_9", "seconds_to_reward_0_9_over_8_steps"
RATE, END = "trajectories_per_s", "reward_last_10_steps"
OURS, TRL_ASYNC = "ours", "TRL AsyncGRPOTrainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another trainer.

    Attributes:
        name: in the table.
        package: whose interpreter runs it.
        script: that runs it.
        options: of the script.
    """

    name: str
    package: str
    script: Path
    options: tuple[str, ...] = ()


PEERS = (
    Peer(name="TRL GRPOTrainer", package="trl", script=HERE.parent / "trl_single_turn.py"),
    Peer(name="Tunix GRPOLearner", package="tunix", script=HERE / "tunix_grpo.py"),
    Peer(
        name="TorchRL GRPOLoss, synchronous",
        package="torchrl",
        script=HERE / "torchrl_grpo.py",
        options=("sync",),
    ),
    Peer(
        name="TorchRL GRPOLoss, asynchronous",
        package="torchrl",
        script=HERE / "torchrl_grpo.py",
        options=("async",),
    ),
)
PACKAGES = tuple(dict.fromkeys(peer.package for peer in PEERS))


def arguments() -> argparse.Namespace:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    for package in PACKAGES:
        parser.add_argument(f"--{package}-python", type=Path, help=f"interpreter with {package}")
    parser.add_argument("--seeds", type=int, help="default 3, quick: 1")
    parser.add_argument("--steps", type=int, help="default 120, quick: 40")
    parser.add_argument("--max-seconds", type=float, default=300, help="of training, others only")
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.steps = args.steps or (40 if args.quick else 120)
    args.runtime, args.staleness_max = "ray", 2
    args.pythons = {name: getattr(args, f"{name}_python") for name in PACKAGES}
    if not any(args.pythons.values()):
        parser.error(f"give at least one of {', '.join(f'--{x}-python' for x in PACKAGES)}")
    return args


def side_by_side(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Run ours and the trainers that are there in turns; return each one's runs, and failures."""
    peers = [peer for peer in PEERS if args.pythons[peer.package]]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *(p.name for p in peers))}
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(args.seeds):
            runs[OURS].append(run_ours(args, seed, folder))
            for peer in peers:
                try:
                    run = run_peer(
                        args.pythons[peer.package],
                        peer.script,
                        *peer.options,
                        seed=seed,
                        steps=args.steps,
                        folder=folder,
                        max_seconds=args.max_seconds,
                    )
                except RuntimeError as error:
                    failures.append(f"{peer.name}, seed {seed}: {last_line(str(error))}")
                else:
                    runs[peer.name].append(run)
    return runs, failures


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["?"])[-1]


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
    return None if done.returncode == 0 else last_line(done.stderr)


def row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a trainer's medians, how many seeds got to the reward, and its versions."""
    medians = headline(runs)
    more = {"versions": runs[0]["versions"]} if "versions" in runs[0] else {}
    if "compile_seconds" in runs[0]:
        more["compile_seconds"] = median(run["compile_seconds"] for run in runs)
    return {
        **{name: medians[name] for name in (RATE, SECONDS, SECONDS_OVER_8, END)},
        "seeds_at_0_9_over_8_steps": sum(run[SECONDS_OVER_8] is not None for run in runs),
        "steps": [run["steps"] for run in runs],
        **more,
    }


def misses(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return where another trainer is as fast as ours."""
    ours, out = rows[OURS], []
    for name, other in rows.items():
        if name == OURS or "error" in other:
            continue
        if other[RATE] >= ours[RATE]:
            out.append(f"{name}: {other[RATE]:.0f} trajectories/s, ours {ours[RATE]:.0f}")
        reached, mine = other[SECONDS_OVER_8], ours[SECONDS_OVER_8]
        if reached is not None and (mine is None or reached <= mine):
            out.append(f"{name}: reward 0.9 after {reached:.1f} s, ours {mine}")
    return out


def print_table(rows: Mapping[str, Mapping[str, Any]], seeds: int) -> None:
    print(f"{'':<32}{'traj/s':>9}{'s to 0.9':>10}{'over 8 steps':>14}{'seeds':>7}{'at end':>8}")
    for name, one in rows.items():
        if "error" in one:
            print(f"{name:<32}does not run here: {one['error']}")
            continue
        cells = [one[RATE], one[SECONDS], one[SECONDS_OVER_8]]
        text = [("-" if c is None else f"{c:.1f}") for c in cells]
        there = f"{one['seeds_at_0_9_over_8_steps']}/{seeds}"
        print(f"{name:<32}{text[0]:>9}{text[1]:>10}{text[2]:>14}{there:>7}{one[END]:>8.3f}")


def main() -> None:
    started = time.perf_counter()
    args = arguments()
    load = os.getloadavg()[0]
    runs, failures = side_by_side(args)
    rows: dict[str, Any] = {name: row(some) for name, some in runs.items() if some}
    rows[OURS]["staleness_max"] = args.staleness_max
    if args.trl_python is not None:
        rows[TRL_ASYNC] = {"error": try_async(args.trl_python)}
    print_table(rows, args.seeds)
    figures = {
        "rows": rows,
        "seeds": args.seeds,
        "steps": args.steps,
        "max_seconds": args.max_seconds,
        "load_at_start": load,
        "throughput_ratios": {
            name: rows[OURS][RATE] / one[RATE]
            for name, one in rows.items()
            if name != OURS and "error" not in one
        },
    }
    finish("peers", figures, [*failures, *misses(rows)], started, args.output)


if __name__ == "__main__":
    main()
