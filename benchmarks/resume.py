"""Does a run survive being killed, at any moment and again and again?

A small run of the default game is started with ``run.resume=auto``; at a random moment, from its
first instant to well into training, its whole process group gets SIGKILL; the same command is
started again. After all kills it runs to its end. ``steps_lost`` of a kill is the last step
recorded before it minus the step from which the next process goes on, and must not exceed
``checkpoint.every_steps``. The metrics must have every step once, with versions that count on.

    python benchmarks/resume.py --output benchmarks/results/resume.json
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import finish, parse_args

ROOT = Path(__file__).resolve().parents[1]
EVERY_STEPS = 10
SMALL = (
    *("model.hidden_size=16", "model.num_heads=2", "environment.in_process=true"),
    *("learner.groups_per_step=4", "rollout.group_size=4", "sampling.max_tokens=1"),
    *("evaluation.num_tasks=4", "evaluation.every_steps=0", "logging.console=plain"),
    *("run.resume=auto", f"checkpoint.every_steps={EVERY_STEPS}"),
)
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 300.0
STARTUP_SHARE = 0.2
"""Of the kills, those that come before the first step of their process."""
LONGEST_TRAINING_S = 4.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One process and its end.

    Attributes:
        phase: ``startup`` or ``training``.
        seconds: from the start of the process to the kill.
        resumed_from: step from which this process went on; 0 for the beginning, None if it was
            killed before it had decided.
        step: last one recorded at the kill.
        checkpoint: step of the newest whole checkpoint then, 0 for none.
        half_written: checkpoints that the kill left unfinished.
        resume_s: from the start of the process to its first step, None if it had none.
    """

    phase: str
    seconds: float
    resumed_from: int | None
    step: int
    checkpoint: int
    half_written: int
    resume_s: float | None

    @property
    def steps_lost(self) -> int:
        """Steps that the next process repeats."""
        return self.step - self.checkpoint


class Trial:
    """One run folder, killed many times.

    Args:
        place: of the run's folder and its output.
        runtime: ``local`` or ``ray``.
        steps: of the whole run.
        seed: of the moments of the kills.
    """

    def __init__(self, place: Path, *, runtime: str, steps: int, seed: int) -> None:
        self.folder = place / runtime
        self._output = place / f"{runtime}.out"
        self._command = (
            *(sys.executable, str(ROOT / "launchers" / "run.py"), *SMALL),
            *(f"run.dir={self.folder}", f"run.steps={steps}", f"runtime={runtime}"),
        )
        self._random = random.Random(f"{seed} {runtime}")

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run in a process group of its own."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true", "OMP_NUM_THREADS": "1"}
        with self._output.open("ab") as output:
            return subprocess.Popen(
                self._command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_the_benchmark,
            )

    def kill_once(self, *, startup_s: float) -> Kill:
        """Start the run and kill it at a random moment.

        Args:
            startup_s: that a start takes; kills in the startup come before.

        Raises:
            RuntimeError: if the run ends by itself, or does not start to train.
        """
        log_before, inode_before = self._log(), self._metrics_inode()
        in_startup = self._random.random() < STARTUP_SHARE
        process, started_s = self.start(), time.monotonic()
        resume_s = None
        try:
            if in_startup:
                time.sleep(self._random.uniform(0, startup_s))
            else:
                self._wait_for_a_step(process, log_before, inode_before)
                resume_s = time.monotonic() - started_s
                time.sleep(self._random.uniform(0, LONGEST_TRAINING_S))
            if process.poll() is not None:
                raise RuntimeError(f"the run ended by itself:\n{self._tail()}")
        finally:
            kill_group(process)
        return Kill(
            phase="startup" if in_startup else "training",
            seconds=round(time.monotonic() - started_s, 2),
            resumed_from=self._went_on_from(log_before),
            step=max(self.steps(), default=0),
            checkpoint=self._newest_checkpoint(),
            half_written=len(list(self.folder.glob("checkpoints/.step-*.partial"))),
            resume_s=None if resume_s is None else round(resume_s, 2),
        )

    def run_to_the_end(self) -> dict[str, Any]:
        """Start the run a last time and return its summary.

        Raises:
            RuntimeError: if it fails.
        """
        process = self.start()
        try:
            code = process.wait(END_TIMEOUT_S)
        finally:
            kill_group(process)
        if code != 0:
            raise RuntimeError(f"the last process ended with {code}:\n{self._tail()}")
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of all whole lines."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> list[int]:
        """Return the steps recorded so far, in the order of the file."""
        return [row["step"] for row in self.rows()]

    def _wait_for_a_step(
        self, process: subprocess.Popen[bytes], log_before: str, inode_before: int
    ) -> None:
        """Wait until this process has recorded a step after the one from which it goes on."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and process.poll() is None:
            went_on = self._went_on_from(log_before)
            # A process makes the file of the metrics anew, without the steps that it repeats.
            is_open = self._metrics_inode() != inode_before
            if went_on is not None and is_open and max(self.steps(), default=0) > went_on:
                return
            time.sleep(0.02)
        raise RuntimeError(f"no step within {START_TIMEOUT_S} s:\n{self._tail()}")

    def _metrics_inode(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def _log(self) -> str:
        path = self.folder / "run.log"
        return path.read_text() if path.exists() else ""

    def _went_on_from(self, log_before: str) -> int | None:
        """Return the step from which the process goes on, None while it has not said so."""
        said = self._log()[len(log_before) :]
        found = re.search(r"goes on from \S+step-(\d+)", said)
        if found is not None:
            return int(found[1])
        return 0 if "starts anew" in said else None

    def _newest_checkpoint(self) -> int:
        names = [path.name for path in self.folder.glob("checkpoints/step-*")]
        return max((int(name.partition("-")[2]) for name in names), default=0)

    def _tail(self) -> str:
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-30:])


def die_with_the_benchmark() -> None:
    """Have the kernel kill this process when its parent ends, however that comes."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, if it still lives."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def problems_of(kills: Sequence[Kill], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is not as promised, one sentence each."""
    problems = []
    for number, kill in enumerate(kills, 1):
        if kill.steps_lost > EVERY_STEPS:
            problems.append(f"kill {number} lost {kill.steps_lost} steps, more than {EVERY_STEPS}")
    for number, (before, kill) in enumerate(pairwise(kills), 2):
        if kill.resumed_from is not None and kill.resumed_from != before.checkpoint:
            problems.append(
                f"process {number} went on from step {kill.resumed_from}, the newest checkpoint "
                f"was {before.checkpoint}"
            )
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(steps) + 1)):
        problems.append("the metrics do not have every step once")
    versions = [row["policy_version"] for row in rows]
    if any(later - earlier not in (0, 1) for earlier, later in pairwise(versions)):
        problems.append("policy versions do not count on")
    times = [row["time_s"] for row in rows]
    if times != sorted(times):
        problems.append("time_s goes back")
    return problems


def run_trial(place: Path, *, runtime: str, num_kills: int) -> tuple[dict[str, Any], list[str]]:
    """Kill one run ``num_kills`` times, let it end, and return its figures and what was wrong."""
    steps_per_kill = 2 * EVERY_STEPS
    trial = Trial(place, runtime=runtime, steps=10**6, seed=0)
    kills: list[Kill] = []
    startup_s = 3.0
    print(f"\n{runtime}: {num_kills} kills, a checkpoint every {EVERY_STEPS} steps")
    print("kill phase      after s  went on from  at step  lost")
    for number in range(1, num_kills + 1):
        kill = trial.kill_once(startup_s=startup_s)
        kills.append(kill)
        if kill.resume_s is not None:
            startup_s = kill.resume_s
        print(
            f"{number:>4} {kill.phase:<9} {kill.seconds:>8.1f} {kill.resumed_from!s:>13} "
            f"{kill.step:>8} {kill.steps_lost:>5}{'  half a checkpoint' * (kill.half_written > 0)}",
            flush=True,
        )
    steps = kills[-1].step + steps_per_kill
    last = Trial(place, runtime=runtime, steps=steps, seed=0)
    summary = last.run_to_the_end()
    problems = problems_of(kills, last.rows())
    if (summary["status"], summary["steps"]) != ("finished", steps):
        problems.append(f"ended as {summary['status']} after {summary['steps']} of {steps} steps")
    resumes = [kill.resume_s for kill in kills if kill.resume_s is not None]
    saves = [row["checkpoint/save_s"] for row in last.rows() if "checkpoint/save_s" in row]
    figures = {
        "kills": [asdict(kill) | {"steps_lost": kill.steps_lost} for kill in kills],
        "steps": summary["steps"],
        "most_steps_lost": max(kill.steps_lost for kill in kills),
        "seconds_to_first_step": statistics.median(resumes) if resumes else None,
        "checkpoint_s": statistics.median(saves) if saves else None,
    }
    return figures, [f"{runtime}: {problem}" for problem in problems]


def main() -> None:
    arguments = parse_args(__doc__ or "")
    started = time.perf_counter()
    runs: dict[str, Any] = {}
    misses: list[str] = []
    trials = (("local", 3),) if arguments.quick else (("local", 20), ("ray", 20))
    with tempfile.TemporaryDirectory() as name:
        for runtime, num_kills in trials:
            runs[runtime], problems = run_trial(Path(name), runtime=runtime, num_kills=num_kills)
            misses += problems
    most_lost = max(figures["most_steps_lost"] for figures in runs.values())
    print(f"\nat most {most_lost} steps lost to a kill, {EVERY_STEPS} allowed")
    figures = {"every_steps": EVERY_STEPS, "most_steps_lost": most_lost, "runs": runs}
    finish("resume", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
