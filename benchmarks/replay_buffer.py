"""Trajectories per second through the replay buffer, beside TorchRL and TransferQueue.

Trajectories of 1,024 tokens (token ids, sampled mask, logprobs, versions: 13 bytes a token) go from
two producer processes through the buffer to one consumer process, in batches of 256. All sides
run under one interpreter, one after the other, in turns; figures are medians. The load and each
side's layout are described in ``benchmarks/peers/buffers.py``.

Ours is compared twice: ``*_ratio`` with groups of 16 inserted as they finish, as ours are, and
``*_chunk64_ratio`` with producers of the other library that hold 64 trajectories back to insert
them at once. Our actors hold nothing back: a report takes whatever has finished since the one
before.

    benchmarks/peers/install.sh buffers DIR
    python benchmarks/replay_buffer.py --peers-python DIR/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from report import argument_parser, finish

HERE = Path(__file__).resolve().parent
TARGET_RATIO = 3.0
ALONE = ("ours-alone", "torchrl-tensor-alone", "torchrl-list-alone")
BETWEEN = ("ours", "torchrl", "transferqueue")


def rate(python: str, side: str, trajectories: int, chunk: int) -> float:
    """Return trajectories per second of one side, in a process of its own."""
    command = [python, str(HERE / "peers" / "buffers.py"), side]
    command += ["--trajectories", str(trajectories), "--chunk", str(chunk)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return float(answer["trajectories"] / answer["seconds"])


def measure(python: str, sides: tuple[str, ...], repeats: int, count: int) -> dict[str, Any]:
    """Measure all sides in turns; the other libraries insert groups, and chunks of 64 too."""
    runs: dict[str, list[float]] = {}
    for _ in range(repeats):
        for side in sides:
            for chunk in (16,) if side.startswith("ours") else (16, 64):
                name = side if chunk == 16 else f"{side}-chunk64"
                runs.setdefault(name, []).append(rate(python, side, count, chunk))
                print(f"{name:<30}{runs[name][-1]:>12,.0f} trajectories/s", flush=True)
    return {name: {"trajectories_per_s": median(r), "runs": r} for name, r in runs.items()}


def ratios(between: Mapping[str, Any]) -> dict[str, float]:
    """Return our rate over each other one, as the figures of the result."""
    ours = between["ours"]["trajectories_per_s"]
    return {
        f"{name.replace('-', '_')}_ratio": ours / figures["trajectories_per_s"]
        for name, figures in between.items()
        if name != "ours"
    }


def main() -> None:
    started = time.perf_counter()
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--peers-python", help="interpreter with torchrl and TransferQueue")
    parser.add_argument("--repeats", type=int, help="default 3, quick: 1")
    args = parser.parse_args()
    repeats = args.repeats or (1 if args.quick else 3)
    count = 2560 if args.quick else 10240
    python = args.peers_python or sys.executable
    peers = args.peers_python is not None
    alone = measure(python, ALONE if peers else ALONE[:1], repeats, count)
    between = measure(python, BETWEEN if peers else BETWEEN[:1], repeats, count)
    result: dict[str, Any] = {
        "trajectories_per_s": between["ours"]["trajectories_per_s"],
        "in_one_process": alone,
        "between_processes": between,
    }
    misses = [] if peers else ["without --peers-python the other libraries were not measured"]
    for name, ratio in ratios(between).items():
        result[name] = ratio
        print(f"ours over {name.removesuffix('_ratio')}: {ratio:.2f}")
        if ratio < TARGET_RATIO:
            misses.append(f"{name} is {ratio:.2f}, target {TARGET_RATIO:g}")
    finish("replay_buffer", result, misses, started, args.output)


if __name__ == "__main__":
    main()
