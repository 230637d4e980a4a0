"""What our own code costs for each trajectory, whatever the number of episodes at a time.

Engines and learner are simulated and take no time; coordinator, admission, buffer, actor,
environments, publisher and metrics are those of every run. The staleness bound alone gives a run
more episodes at a time; tools take longer in proportion.

* Processor time is that of the running process between two moments, so neither starting nor ending
  nor an episode that is half done at one of them weighs on the shortest run most.
* Trajectories come at one rate in all cases, or what a process costs in every second would be
  shared by more of them in one case than in another. A first round, not counted, finds the latency
  for that.
* Latencies are exponential: tools that all take equally long keep all episodes in step, which then
  wake up together and share what each would cost alone.
* All cases run at the same time and are watched over the same spans: what the machine does to one
  it does to all, while runs one after the other differ by more than their cases. Together they take
  less than one core. Each case starts several times, as no two processes are alike either.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from run_once import ROOT

GROUP_SIZE, TURNS = 5, 3
BATCH = 10  # trajectories of a learner step: as many as the fewest episodes at a time
TRAJECTORIES_PER_S = 200
MAX_SPREAD = 0.20
# A group ends with its slowest episode, and is then reported, trained and replaced.
_LATENCIES_PER_GROUP, _OVERHEAD_S = 5.5, 0.02
_EPISODES_BEFORE = 3  # until episodes that began together have spread out
_START_TIMEOUT_S, _END_TIMEOUT_S = 120.0, 20.0
_INTERRUPTED = 128 + signal.SIGINT

KEYS = (
    "runtime=local",
    "run.steps=1000000",
    "evaluation.num_tasks=0",
    "checkpoint.every_steps=0",
    "logging.samples_every_steps=0",
    "logging.tensorboard=false",
    "logging.console=plain",
    "logging.report=false",
    "simulate.engine=true",
    "simulate.learner=true",
    "simulate.reply_tokens=fixed:8",
    "engine.context_length=2048",
    "engine.max_concurrent=1024",
    "sampling.max_tokens=128",
    "environment.name=skyrl_async.environments.slow_tool:SlowTool",
    f"environment.options.turns=fixed:{TURNS}",
    "environment.episode_timeout_s=120",
    f"rollout.group_size={GROUP_SIZE}",
    f"learner.groups_per_step={BATCH // GROUP_SIZE}",
)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is.

    Attributes:
        time_s: monotonic.
        cpu_s: processor time so far.
        steps: learner steps so far, as lines of JSON.
    """

    time_s: float
    cpu_s: float
    steps: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run during one span.

    Attributes:
        us_per_trajectory: processor time, microseconds.
        trajectories_per_s: trained.
        episodes_fraction: of the episodes at a time that were played; the others waited for their
            group or for admission.
    """

    us_per_trajectory: float
    trajectories_per_s: float
    episodes_fraction: float


def measure_machinery(
    counts: Sequence[int], folder: Path, *, span_s: float, spans: int, rounds: int, pilot: bool
) -> list[dict[str, Any]]:
    """Return a row for each number of episodes at a time, with the median of its spans.

    Args:
        counts: episodes at a time, multiples of ``BATCH``.
        folder: for the runs.
        span_s: seconds of one span.
        spans: in which each run is watched.
        rounds: runs of each case.
        pilot: find the latencies by a run of each case before; otherwise they are estimated.
    """
    latencies = {count: _latency_s(count) for count in counts}
    if pilot:
        for count, (cost,) in watch(latencies, folder / "pilot", span_s=span_s, spans=1).items():
            late_s = count / cost.trajectories_per_s - count / TRAJECTORIES_PER_S
            corrected = latencies[count] - late_s / _LATENCIES_PER_GROUP
            latencies[count] = max(0.1 * latencies[count], corrected)
    costs: dict[int, list[Cost]] = {count: [] for count in counts}
    for number in range(rounds):
        watched = watch(latencies, folder / str(number), span_s=span_s, spans=spans)
        for count, found in watched.items():
            costs[count] += found
    return [_row(count, costs[count], latency_s=latencies[count]) for count in counts]


def _latency_s(count: int) -> float:
    """Return about how long each tool may take for trajectories to come at their rate."""
    group_s = count / TRAJECTORIES_PER_S
    return max(0.001, (group_s - _OVERHEAD_S) / _LATENCIES_PER_GROUP)


def _row(count: int, costs: Sequence[Cost], *, latency_s: float) -> dict[str, Any]:
    values = [cost.us_per_trajectory for cost in costs]
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "concurrent": count,
        "latency_mean_s": latency_s,
        "trajectories_per_s": statistics.median(c.trajectories_per_s for c in costs),
        "episodes_mean": count * statistics.median(c.episodes_fraction for c in costs),
        "machinery_us_per_trajectory": median,
        "spans": values,
        "interquartile_range": (high - low) / median,
    }


def watch(
    latencies: Mapping[int, float], folder: Path, *, span_s: float, spans: int
) -> dict[int, list[Cost]]:
    """Run all cases at once, and return what each cost in each span.

    Args:
        latencies: mean of a tool, seconds, by episodes at a time.
        folder: for the runs.
        span_s: seconds of one span.
        spans: one after the other, once episodes no longer begin together.

    Raises:
        RuntimeError: if a run fails, does not start in time, or does no step in a span.
    """
    with contextlib.ExitStack() as stack:
        runs: dict[int, tuple[Path, int]] = {}
        for count, latency_s in latencies.items():
            place = folder / str(count)
            bound = f"staleness.max={count // BATCH - 1}"
            latency = f"environment.options.latency_s=exponential:{latency_s}"
            run = stack.enter_context(_running(place, (*KEYS, bound, latency)))
            runs[count] = (place, run.pid)
        time.sleep(1.0 + _EPISODES_BEFORE * max(latencies) / TRAJECTORIES_PER_S)
        moments = [{count: _moment(*run) for count, run in runs.items()}]
        for _ in range(spans):
            time.sleep(span_s)
            moments.append({count: _moment(*run) for count, run in runs.items()})
    return {
        count: [_cost(before[count], after[count]) for before, after in pairwise(moments)]
        for count in latencies
    }


def _cost(before: Moment, after: Moment) -> Cost:
    rows = [json.loads(line) for line in after.steps[len(before.steps) :]]
    if not rows:
        raise RuntimeError(f"no step in {after.time_s - before.time_s:.1f} s")
    trajectories = len(rows) * BATCH
    return Cost(
        us_per_trajectory=1e6 * (after.cpu_s - before.cpu_s) / trajectories,
        trajectories_per_s=trajectories / (after.time_s - before.time_s),
        episodes_fraction=statistics.fmean(_playing(row) for row in rows),
    )


def _moment(place: Path, pid: int) -> Moment:
    return Moment(time_s=time.monotonic(), cpu_s=_cpu_s(pid), steps=_steps(place))


def _playing(row: Mapping[str, Any]) -> float:
    """Return the share of an actor's slots in which an episode is played."""
    waits = ("idle/actor/wait_admission_fraction", "idle/actor/wait_group_fraction")
    return 1.0 - sum(row.get(name, 0.0) for name in waits)


@contextlib.contextmanager
def _running(place: Path, keys: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a run that has done a step; interrupt it afterwards.

    Raises:
        RuntimeError: if it ends by itself, or does no step in time.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    output = place.with_suffix(".txt")
    command = [sys.executable, str(ROOT / "launchers" / "run.py"), f"run.dir={place}", *keys]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true"}
    with output.open("wb") as file:
        run = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        limit_s = time.monotonic() + _START_TIMEOUT_S
        while not _steps(place):
            if run.poll() is not None or time.monotonic() > limit_s:
                raise RuntimeError(f"the run did no step:\n{output.read_text()}")
            time.sleep(0.1)
        yield run
        run.send_signal(signal.SIGINT)
        if run.wait(_END_TIMEOUT_S) != _INTERRUPTED:
            raise RuntimeError(f"the run ended by itself:\n{output.read_text()}")
    finally:
        run.kill()
        run.wait()


def _steps(place: Path) -> list[bytes]:
    """Return the whole lines that a run has written, one for each learner step."""
    path = place / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process and its ended threads, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Numbers 14 and 15 of proc(5), of which the first two are cut off.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def flat_figures(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of all rows and the targets that they miss."""
    medians = [row["machinery_us_per_trajectory"] for row in rows]
    spread = max(medians) / min(medians) - 1
    misses = []
    if spread > MAX_SPREAD:
        misses.append(
            f"machinery per trajectory differs by {spread:.0%} with concurrency, not "
            f"{MAX_SPREAD:.0%}"
        )
    figures = {
        "machinery_us_per_trajectory": medians,
        "machinery_growth": max(medians) / medians[0] - 1,
        "machinery_spread": spread,
        "machinery": list(rows),
    }
    return figures, misses
