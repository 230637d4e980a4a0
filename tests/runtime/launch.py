"""Starting real runs through the command line, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers" / "run.py"

SMALL = (
    "learner.groups_per_step=4",
    "rollout.group_size=4",
    "model.hidden_size=16",
    "model.num_heads=2",
    "evaluation.num_tasks=4",
    "logging.console=plain",
    "environment.in_process=true",
)


def run_here(folder: Path, *overrides: str) -> dict[str, Any]:
    """Do a small run in this process; return the summary, with the exit code as ``exit_code``."""
    from skyrl_async.config_loading import load_config
    from skyrl_async.run import train
    from skyrl_async.run_folder import RunFolder

    config = load_config(None, [*SMALL, "runtime=local", f"run.dir={folder}", *overrides])
    with RunFolder.create(config) as run_folder:
        code = train(config, run_folder)
    return {**json.loads((folder / "summary.json").read_text()), "exit_code": code}


def start(folder: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start a small run in a session of its own, with its output in ``<folder>.out``."""
    output = open(folder.with_suffix(".out"), "w")  # noqa: SIM115 - the child writes to it
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *SMALL, f"run.dir={folder}", *overrides],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CI": "true", "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


class RunProcess(Protocol):
    """What ``subprocess.Popen`` has, for the process of a run."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def finish(process: RunProcess, folder: Path, *, timeout_s: float) -> dict[str, Any]:
    """Wait for the end and return the summary, with the exit code as ``exit_code``."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running:\n{output_of(folder)}") from None
    path = folder / "summary.json"
    assert path.exists(), output_of(folder)
    return {**json.loads(path.read_text()), "exit_code": code}


def output_of(folder: Path) -> str:
    return folder.with_suffix(".out").read_text()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Poll a condition of another process, up to a deadline."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s until {what}"
        time.sleep(0.05)


def processes_of_session(session: int) -> list[int]:
    """Return the living processes of a session, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def processes_mentioning(text: str) -> list[int]:
    """Return the living processes whose command line or environment has ``text``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            known = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and text.encode() in known:
            found.append(int(folder.name))
    return found
