"""Small timelines to test with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from skyrl_async.timeline.reader import FlowPoint, Span, Trace, TraceLane


def lane(
    *spans: tuple[str, float, float],
    process: str = "p",
    role: str = "engine",
    name: str = "n",
    flows: Sequence[FlowPoint] = (),
) -> TraceLane:
    """Return a lane of spans given as name, start and end."""
    made = sorted((Span(*span) for span in spans), key=lambda s: (s.start_s, -s.end_s))
    return TraceLane(
        process=process, role=role, name=name, spans=tuple(made), instants=(), flows=tuple(flows)
    )


def trace(*lanes: TraceLane) -> Trace:
    """Return a trace that ends with its last span."""
    end = max((span.end_s for one in lanes for span in one.spans), default=0.0)
    return Trace(lanes=lanes, start_wall_s=1000.0, end_s=end, sections=(0.0,))


def write(
    run: Path,
    process: str,
    *events: Sequence,
    clock: str = "host",
    wall_s: float = 1000.0,
    monotonic_s: float = 10.0,
) -> None:
    """Append a section to the file of a process."""
    header = {"trace": 1, "process": process, "clock": clock}
    header |= {"wall_s": wall_s, "monotonic_s": monotonic_s}
    folder = run / "trace"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{process.replace(' ', '_')}.jsonl", "a") as file:
        for line in (header, *events):
            file.write(json.dumps(line) + "\n")


def write_small_run(run: Path) -> None:
    """Write a learner that makes one version, and an engine that loads it."""
    write(
        run,
        "learner 0",
        ["L", 0, "learner", "rank 0", []],
        ["L", 1, "publisher", "transfer to rollout actor 0", []],
        ["X", 0, "wait", 0, 1_000_000],
        ["X", 0, "learner step", 1_000_000, 2_000_000, {"policy_version": 1}],
        ["X", 0, "train", 1_000_000, 2_000_000],
        ["F", 0, "made", 3_000_000, 1, ""],
        ["F", 1, "sent", 3_000_000, 1, "rollout actor 0"],
        ["X", 1, "transfer", 3_000_000, 500_000, {"policy_version": 1}],
    )
    write(
        run,
        "rollout actor 0",
        ["L", 0, "engine", "engine", []],
        ["L", 1, "slot", "slot 0", ["generate", "environment"]],
        ["X", 0, "decode", 0, 3_000_000, {"steps": 9, "tokens": 90}],
        ["X", 0, "swap", 3_400_000, 100_000, {"policy_version": 1}],
        ["F", 0, "loaded", 3_500_000, 1, ""],
        ["C", 1, 0, [0, 1_000_000, 12, 1, 500_000, 0]],
    )
