"""One run of ``launchers/run.py`` in a process of its own, for benchmarks that compare runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a finished run left behind.

    Attributes:
        command: that repeats it.
        summary: of ``summary.json``.
        metrics: one object for each learner step.
    """

    command: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[tuple[float, int, float]]:
        """Seconds since the start of training, step and greedy reward of each evaluation.

        The one after the last step is among them.
        """
        rows = [
            (m["time_s"], m["step"], m["eval/reward_mean"])
            for m in self.metrics
            if m.get("eval/reward_mean") is not None
        ]
        summary = self.summary
        if summary["eval_reward_final"] is None:
            return rows
        return [*rows, (summary["seconds"], summary["steps"], summary["eval_reward_final"])]

    def reached(self, reward: float) -> tuple[float, int] | None:
        """Return seconds and step of the first evaluation of at least ``reward``, if any."""
        return next(((time, step) for time, step, r in self.evaluations if r >= reward), None)

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the steps that have it.

        Raises:
            ValueError: if none has it.
        """
        values = [m[name] for m in self.metrics if name in m]
        if not values:
            raise ValueError(f"{name} is not in the metrics of {self.command}")
        return float(sum(values) / len(values))


def run_once(place: Path, *overrides: str, timeout_s: float = 900) -> Run:
    """Train with these overrides, and return what was left in the folder ``place``.

    TensorBoard is off and the console plain.

    Raises:
        RuntimeError: if the run fails, with its output.
        subprocess.TimeoutExpired: after ``timeout_s``.
    """
    keys = (*overrides, "logging.tensorboard=false", "logging.console=plain")
    launcher = ROOT / "launchers" / "run.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true"}
    done = subprocess.run(
        [sys.executable, str(launcher), f"run.dir={place}", *keys],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    command = " ".join(("python launchers/run.py", *keys))
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return Run(
        command=command,
        summary=json.loads((place / "summary.json").read_text()),
        metrics=[json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()],
    )
