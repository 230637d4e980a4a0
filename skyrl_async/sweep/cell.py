"""One cell of a sweep, in a process that has loaded everything already."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from skyrl_async.config import Config
from skyrl_async.config_loading import dump_config, load_config
from skyrl_async.sweep.grid import Cell, digest

FOLDER_KEYS = (
    *("logging.tensorboard=false", "logging.console=off", "logging.trace=false"),
    *("logging.samples_every_steps=0", "checkpoint.every_steps=0", "run.resume=never"),
)
"""What every cell has: nobody looks at it while it runs, and a torn one begins anew."""

OUTPUT = "output.txt"
RUN = "run"


def resolve(cell: Cell, config: Path | None) -> Config:
    """Return the configuration of a cell.

    Raises:
        ConfigError: if it is not valid.
    """
    return load_config(config, [*cell.overrides, *FOLDER_KEYS])


def as_mapping(config: Config) -> dict[str, Any]:
    """Return a configuration as values of JSON."""
    return dict(yaml.safe_load(dump_config(config)))


def identity(config: Config) -> str:
    """Return what is equal for two runs that do the same."""
    return digest(config.model_dump(mode="json", exclude_defaults=True))


def run_cell(cell: Cell, config: Path | None, folder: Path) -> None:
    """Do the run of a cell in this process, which then ends with the run's exit code.

    Args:
        cell: to run.
        config: file that it builds on.
        folder: empty; the run's is below it, and so is what it prints.
    """
    from skyrl_async.preflight import find_problems
    from skyrl_async.run import train
    from skyrl_async.run_folder import RunFolder

    output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = folder / RUN
    resolved = load_config(config, [*cell.overrides, *FOLDER_KEYS, f"run.dir={place}"])
    if problems := find_problems(resolved):
        sys.exit("\n".join(problems))
    with RunFolder.create(resolved) as run_folder:
        code = train(resolved, run_folder)
    sys.stdout.flush()
    # What is left in threads must not keep the process.
    os._exit(code)


def why_it_failed(folder: Path, exit_code: int | None) -> str:
    """Return the reason in one line: of the run, of what it printed, or how its process ended."""
    summary = read_summary(folder)
    if summary.get("error"):
        return str(summary["error"])
    output = folder / OUTPUT
    lines = output.read_text(errors="replace").split("\n") if output.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    how = "it took too long" if exit_code is None else f"its process ended with {exit_code}"
    return f"{how}: {last}" if last else how


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of the run below a cell's folder; empty if there is none."""
    path = folder / RUN / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
