"""What the timeline costs: CPU time of an event, times the events of a real default run.

The default run (``python launchers/run.py``) leaves its timeline; its events are then recorded,
encoded and written once more, with nothing else to do, and the CPU time of that is taken. A span
of an episode counts as one event, although those of an episode are recorded together.

The idle shares count the time of all slots, also of those that are not drawn; that is measured too.

Target: all processes together spend at most 1 % of a core on it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import finish, parse_args
from run_once import Run, run_once

from skyrl_async.metrics.trace import FOLDER, Lane, Tracer
from skyrl_async.rollout.slots import Slots

MAX_CORE_FRACTION = 0.01
MAX_US_PER_EVENT = 3.0
RUN_SECONDS = 20
REPEATS = 5

Recorded = Callable[[list[Lane]], None]
"""One event of the run, ready to be recorded once more."""


@dataclass(frozen=True, slots=True)
class Process:
    """The timeline of one process.

    Attributes:
        name: of it.
        lanes: as ``Tracer.lane`` takes them.
        events: in their order.
        num_events: of them, every span of a chain counted.
        size_bytes: of the file.
    """

    name: str
    lanes: list[dict[str, Any]]
    events: list[Recorded]
    num_events: int
    size_bytes: int


def read_process(path: Path) -> Process:
    """Return what one process recorded."""
    lanes: list[dict[str, Any]] = []
    events: list[Recorded] = []
    num_events, name = 0, ""
    for line in path.read_text().splitlines():
        value = json.loads(line)
        if isinstance(value, dict):
            name = value["process"]
        elif value[0] == "L":
            lanes.append({"role": value[2], "name": value[3], "parts": value[4]})
        else:
            event, count = replayed(value)
            events.append(event)
            num_events += count
    return Process(name, lanes, events, num_events, path.stat().st_size)


def replayed(value: list[Any]) -> tuple[Recorded, int]:
    """Return an event ready to be recorded, and how many it counts as."""
    kind, number = value[0], value[1]
    if kind == "X":
        name, start, duration = value[2:5]
        args = value[5] if len(value) > 5 else None
        begin, end = start * 1e-6, (start + duration) * 1e-6
        return (lambda lanes: lanes[number].span(name, begin, end, args)), 1
    if kind == "I":
        name, moment = value[2:4]
        args = value[4] if len(value) > 4 else None
        return (lambda lanes: lanes[number].instant(name, moment * 1e-6, args)), 1
    if kind == "F":
        stage, micros, version, engine = value[2:]
        return (
            lambda lanes: lanes[number].flow(
                stage, policy_version=version, time_s=micros * 1e-6, engine=engine
            )
        ), 1
    if kind == "C":
        start, flat = value[2:]
        ends, at = [], start
        for part, duration, tokens in triples(flat):
            at += duration
            ends += [part, at * 1e-6, tokens]
        return (lambda lanes: lanes[number].chain(start * 1e-6, ends)), len(ends) // 3
    raise ValueError(f"an event of unknown kind {kind!r}")


def triples(flat: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield part, duration and value of each span of a chain."""
    for index in range(0, len(flat), 3):
        yield flat[index], flat[index + 1], flat[index + 2]


def us_per_event(process: Process, folder: Path) -> float:
    """Return the CPU time of recording, encoding and writing one of its events."""
    best = float("inf")
    for repeat in range(REPEATS):
        tracer = Tracer(folder / str(repeat), process=process.name, flush_interval_s=1e6)
        lanes = [tracer.lane(**lane) for lane in process.lanes]
        started = time.process_time()
        for event in process.events:
            event(lanes)
        tracer.flush()
        best = min(best, time.process_time() - started)
        tracer.close()
    return 1e6 * best / max(1, process.num_events)


def us_per_switch() -> float:
    """Return the CPU time of telling a slot that is not drawn what its episode does now."""
    slots = Slots()
    opened = [slots.open() for _ in range(256)]
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        for slot in opened:
            for _ in range(20):
                slot.works()
                slot.generates()
                slot.generated(3, queued_s=0.0)
        best = min(best, time.process_time() - started)
        slots.take()
    return 1e6 * best / (len(opened) * 20 * 3)


def switches_per_s(run: Run) -> float:
    """Return how often per second the slots of a run were told something: from its metrics."""
    rows = [m for m in run.metrics[1:] if m.get("rollout/turns_mean") is not None]
    per_s = [m["throughput/trajectories_per_s"] * (3 * m["rollout/turns_mean"] + 5) for m in rows]
    return sum(per_s) / len(per_s)


def main() -> None:
    """Measure, and print the result."""
    arguments = parse_args(__doc__ or "")
    started = time.perf_counter()
    seconds = 8 if arguments.quick else RUN_SECONDS
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = run_once(
            folder / "run",
            *(f"run.max_seconds={seconds}", "run.steps=100000", "evaluation.num_tasks=0"),
        )
        processes = [read_process(p) for p in sorted((folder / "run" / FOLDER).glob("*.jsonl"))]
        costs = [us_per_event(process, folder) for process in processes]
    switch_us, switches, trained_s = us_per_switch(), switches_per_s(run), run.summary["seconds"]
    rows = [
        {
            "process": process.name,
            "events_per_s": round(process.num_events / trained_s, 1),
            "bytes_per_s": round(process.size_bytes / trained_s),
            "us_per_event": round(cost, 3),
            "core_fraction": round(1e-6 * cost * process.num_events / trained_s, 6),
        }
        for process, cost in zip(processes, costs, strict=True)
    ]
    finish("timeline_overhead", *summary(rows, run, switch_us, switches), started, arguments.output)


def summary(
    rows: list[dict[str, Any]], run: Run, switch_us: float, switches: float
) -> tuple[dict[str, Any], list[str]]:
    """Print the table; return the figures and the targets that were missed."""
    total = sum(row["events_per_s"] for row in rows)
    fraction = sum(row["core_fraction"] for row in rows)
    mean_us = 1e6 * fraction / total
    print(f"{'process':<18} {'events/s':>9} {'bytes/s':>9} {'us/event':>9} {'of a core':>10}")
    for row in rows:
        print(
            f"{row['process']:<18} {row['events_per_s']:>9.0f} {row['bytes_per_s']:>9} "
            f"{row['us_per_event']:>9.2f} {row['core_fraction']:>10.3%}"
        )
    print(f"{'together':<18} {total:>9.0f} {'':>9} {mean_us:>9.2f} {fraction:>10.3%}")
    ledger = 1e-6 * switch_us * switches
    print(f"idle shares of slots: {switches:.0f}/s at {switch_us:.2f} us, {ledger:.3%} of a core")
    misses = []
    if fraction > MAX_CORE_FRACTION:
        misses.append(f"{fraction:.2%} of a core, at most {MAX_CORE_FRACTION:.0%} wanted")
    if mean_us > MAX_US_PER_EVENT:
        misses.append(f"{mean_us:.2f} us per event, at most {MAX_US_PER_EVENT} wanted")
    figures = {
        "run": run.command,
        "rows": rows,
        "us_per_event": round(mean_us, 3),
        "events_per_s": round(total, 1),
        "core_fraction": round(fraction, 6),
        "slot_switches_per_s": round(switches, 1),
        "us_per_slot_switch": round(switch_us, 3),
        "slot_core_fraction": round(ledger, 6),
        "trajectories_per_s": round(run.mean("throughput/trajectories_per_s"), 1),
    }
    return figures, misses


if __name__ == "__main__":
    main()
