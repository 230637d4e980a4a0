"""Run a grid of runs: python launchers/sweep.py [FILE] [--axis NAME=V1,V2 ...] [key=value ...].

    python launchers/sweep.py launchers/sweeps/lab_staleness.yaml --output sweeps/staleness
    python launchers/sweep.py --config launchers/configs/lab_task.yaml \
        --axis method=grpo,m2po --axis lag=0,8 --axis seed=0,1 --output sweeps/two run.steps=100

Every axis is a dotted key, or one of those that FILE explains; `method=NAME` stands for
`algorithm=NAME`, and `lag=K` for lab.exact_lag=K and staleness.max=K. Each run becomes one line of
OUTPUT/rows.jsonl. Runs that are there are not run again, so the same command goes on with a sweep.

Exit codes: 0 all runs are there, 1 some failed, 2 bad input, 3 some are left, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from skyrl_async.config_loading import ConfigError
from skyrl_async.sweep.grid import Block, Sweep, Value, read_sweep
from skyrl_async.sweep.runner import Limits, Outcome, Runner

FINISHED, FAILED, BAD_INPUT, LEFT, INTERRUPTED = 0, 1, 2, 3, 130
MAX_SLICE_S = 45 * 60.0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", help="YAML with blocks of axes")
    parser.add_argument("overrides", nargs="*", help="key=value of all runs")
    parser.add_argument("--axis", action="append", default=[], help="NAME=V1,V2: a further block")
    parser.add_argument("--config", type=Path, help="file that all runs build on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument(
        "--max-seconds", type=float, default=MAX_SLICE_S, help="at most 2700; call again to go on"
    )
    parser.add_argument("--cell-timeout", type=float, default=1800.0, help="seconds of one run")
    parser.add_argument("--pause-while", type=Path, help="start no run while this file exists")
    parser.add_argument("--retry-failed", action="store_true", help="run again what has failed")
    parser.add_argument("--keep-runs", action="store_true", help="keep the folder of every run")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    return parser


def read_arguments(arguments: argparse.Namespace) -> tuple[Sweep, Limits]:
    """Return the sweep that the command line names, and how to run it.

    Raises:
        ValueError: if it is not possible.
    """
    overrides = list(arguments.overrides)
    file = arguments.sweep
    if file is not None and "=" in file:
        overrides.insert(0, file)
        file = None
    sweep = read_sweep(Path(file)) if file else Sweep(blocks=())
    if arguments.axis:
        axes = dict(_axis(text) for text in arguments.axis)
        sweep = replace(sweep, blocks=(*sweep.blocks, Block(values=axes)))
    if not sweep.blocks:
        raise ValueError("no runs: name a FILE, or --axis NAME=V1,V2")
    if arguments.max_seconds > MAX_SLICE_S:
        raise ValueError(
            f"--max-seconds {arguments.max_seconds:g}: at most {MAX_SLICE_S:g}; the same command "
            "goes on with the sweep"
        )
    sweep = replace(
        sweep,
        config=arguments.config or sweep.config,
        overrides=(*sweep.overrides, *overrides),
    )
    limits = Limits(
        jobs=arguments.jobs,
        max_seconds=arguments.max_seconds,
        cell_timeout_s=arguments.cell_timeout,
        pause_while=arguments.pause_while,
        keep_runs=arguments.keep_runs,
    )
    return sweep, limits


def _axis(text: str) -> tuple[str, tuple[Value, ...]]:
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ValueError(f"--axis {text}: write --axis NAME=V1,V2")
    return name, tuple(yaml.safe_load(value) for value in values.split(","))


def run_sweep(sweep: Sweep, limits: Limits, *, folder: Path, retry_failed: bool) -> Outcome:
    """Run what is missing of a sweep, while no other process does.

    Raises:
        ValueError: if another process does, or a configuration is not valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {folder}: another sweep is running in it") from None
        runner = Runner(
            sweep.cells(),
            config=sweep.config,
            folder=folder,
            limits=limits,
            retry_failed=retry_failed,
            commit=_commit(),
            report=lambda line: print(line, flush=True),
        )
        return runner.run()


def _commit() -> str:
    """Return the commit that is checked out, with ``-dirty`` if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return answer.stdout.strip() or "unknown"


def main(argv: Sequence[str]) -> int:
    """Run what the command line says and return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        sweep, limits = read_arguments(arguments)
        cells = sweep.cells()
        if arguments.dry_run:
            print("\n".join(cell.label for cell in cells))
            return FINISHED
        outcome = run_sweep(
            sweep, limits, folder=arguments.output, retry_failed=arguments.retry_failed
        )
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(
        f"{outcome.finished} of {outcome.total} runs finished, {outcome.failed} failed, "
        f"{outcome.left} left: {os.path.relpath(arguments.output)}/rows.jsonl"
    )
    if outcome.left:
        return LEFT
    return FAILED if outcome.failed else FINISHED


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Also in the background of a shell, which ignores interrupts there.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        exit_code = main(sys.argv[1:])
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    sys.exit(exit_code)
