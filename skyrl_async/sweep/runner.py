"""Running the cells of a sweep: several at a time, resumable, within a limit of time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from skyrl_async.sweep.cell import (
    RUN,
    as_mapping,
    identity,
    read_summary,
    resolve,
    run_cell,
    why_it_failed,
)
from skyrl_async.sweep.grid import Cell
from skyrl_async.sweep.rows import Row, append_row, read_rows, read_series

CELLS = "cells"
_ATTEMPTS = 2
_POLL_S = 0.05
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a sweep is run.

    Attributes:
        jobs: cells at a time.
        max_seconds: no cell is started that would not end by then, as far as that is known, and
            those still running are ended, to be run again; None for no limit.
        cell_timeout_s: a cell that takes longer has failed.
        pause_while: no cell is started while this file exists.
        keep_runs: whether to keep the runs' folders.

    Raises:
        ValueError: if a number is not positive, or there are more jobs than cores.
    """

    jobs: int = 1
    max_seconds: float | None = None
    cell_timeout_s: float = 1800.0
    pause_while: Path | None = None
    keep_runs: bool = False

    def __post_init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        if not 1 <= self.jobs <= cores:
            raise ValueError(f"jobs must be in 1..{cores}, the cores of this machine: {self.jobs}")
        for name in ("max_seconds", "cell_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a sweep.

    Attributes:
        total: cells of the grid.
        finished: of them, now and before.
        failed: of them, now and before.
        left: not run yet, for want of time.
    """

    total: int
    finished: int
    failed: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    cell: Cell
    digest: str
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    job: _Job
    process: ForkServerProcess
    started_s: float


class Runner:
    """Runs what is missing of a sweep; several runners must not share a folder.

    ::

        outcome = Runner(cells, config=file, folder=Path("sweeps/x"), limits=Limits()).run()

    Args:
        cells: in their order.
        config: file that they build on.
        folder: of the sweep; what is there already is not run again.
        limits: of this call.
        retry_failed: whether to run again what has failed before.
        commit: of the code, for the rows.
        report: told a line about every cell.

    Raises:
        ConfigError: if a cell's configuration is not valid.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        config: Path | None,
        folder: Path,
        limits: Limits,
        retry_failed: bool = False,
        commit: str = "unknown",
        report: Callable[[str], None] = print,
    ) -> None:
        self._config = config
        self._folder = folder
        self._limits = limits
        self._commit = commit
        self._report = report
        self._jobs = [_Job(cell=c, digest=identity(resolve(c, config))) for c in cells]
        self._rows = {row.digest: row for row in read_rows(folder)}
        self._waiting = deque(
            job
            for job in self._jobs
            if job.digest not in self._rows
            or (retry_failed and self._rows[job.digest].status == "failed")
        )
        self._running: list[_Running] = []
        self._longest_s = 0.0

    def run(self) -> Outcome:
        """Run cells until all are done or the time is over."""
        (self._folder / CELLS).mkdir(parents=True, exist_ok=True)
        started_s, limit = time.monotonic(), self._limits.max_seconds
        end_s = None if limit is None else started_s + limit
        context = _context()
        try:
            while self._waiting or self._running:
                now_s = time.monotonic()
                if end_s is not None and now_s >= end_s:
                    break
                if self._may_start(now_s, end_s):
                    self._start(context, self._waiting.popleft())
                elif not self._running and end_s is not None and now_s + self._longest_s > end_s:
                    break
                else:
                    time.sleep(_POLL_S)
                self._collect()
        finally:
            for running in self._running:
                _end(running.process)
        return self._outcome()

    def _may_start(self, now_s: float, end_s: float | None) -> bool:
        pause = self._limits.pause_while
        return (
            bool(self._waiting)
            and len(self._running) < self._limits.jobs
            and (end_s is None or now_s + self._longest_s <= end_s)
            and not (pause is not None and pause.exists())
        )

    def _place(self, job: _Job) -> Path:
        return self._folder / CELLS / job.digest

    def _start(self, context: ForkServerContext, job: _Job) -> None:
        place = self._place(job)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        process = context.Process(target=run_cell, args=(job.cell, self._config, place.absolute()))
        process.start()
        self._running.append(_Running(job=job, process=process, started_s=time.monotonic()))

    def _collect(self) -> None:
        """Take the cells that have ended, and end those that take too long."""
        for running in tuple(self._running):
            took_s = time.monotonic() - running.started_s
            if running.process.is_alive():
                if took_s > self._limits.cell_timeout_s:
                    _end(running.process)
                    self._take(running, took_s, exit_code=None)
                continue
            running.process.join()
            self._longest_s = max(self._longest_s, took_s)
            self._take(running, took_s, exit_code=running.process.exitcode)

    def _take(self, running: _Running, took_s: float, *, exit_code: int | None) -> None:
        self._running.remove(running)
        job, place = running.job, self._place(running.job)
        summary = read_summary(place)
        finished = exit_code == 0 and summary.get("status") == "finished"
        error = None if finished else why_it_failed(place, exit_code)
        if error is not None and job.attempt < _ATTEMPTS:
            self._report(f"{job.cell.label}: {error}; once more")
            self._waiting.appendleft(
                _Job(cell=job.cell, digest=job.digest, attempt=job.attempt + 1)
            )
            return
        row = self._row(job, error=error, took_s=took_s)
        append_row(self._folder, row)
        self._rows[row.digest] = row
        if finished and not self._limits.keep_runs:
            shutil.rmtree(place, ignore_errors=True)
        reward = "" if row.reward is None else f"reward {row.reward:.3f}, "
        self._report(f"{job.cell.label}: {error or f'{reward}{took_s:.1f} s'}")

    def _row(self, job: _Job, *, error: str | None, took_s: float) -> Row:
        place = self._place(job)
        summary = read_summary(place)
        base = () if self._config is None else ("--config", os.path.relpath(self._config))
        return Row(
            digest=job.digest,
            cell=job.cell.axes,
            status="finished" if error is None else "failed",
            error=error,
            attempts=job.attempt,
            commit=self._commit,
            command=" ".join(("python launchers/run.py", *base, *job.cell.overrides)),
            overrides=job.cell.overrides,
            config=as_mapping(resolve(job.cell, self._config)),
            seconds=summary.get("seconds"),
            total_seconds=took_s,
            reward=summary.get("eval_reward_final"),
            reward_final=summary.get("reward_final"),
            series=read_series(place / RUN / "metrics.jsonl"),
            summary=summary,
        )

    def _outcome(self) -> Outcome:
        rows = [self._rows[job.digest] for job in self._jobs if job.digest in self._rows]
        failed = sum(row.status == "failed" for row in rows)
        return Outcome(
            total=len(self._jobs),
            finished=len(rows) - failed,
            failed=failed,
            left=len(self._waiting) + len(self._running),
        )


def _context() -> ForkServerContext:
    """Return what forks cells from a process that has loaded torch already."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skyrl_async.sweep.preload"])
    return context


def _end(process: ForkServerProcess) -> None:
    process.terminate()
    process.join(_GRACE_S)
    if process.is_alive():
        process.kill()
        process.join(_GRACE_S)
