"""The report of a long run: seconds to write it, its size, and how fast Chromium draws it.

The same for the live page, whose server reads the run's files once, and then what was added.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.chromium import Loaded, browser, load
from benchmarks.report import finish, parse_args
from benchmarks.synthetic_run import write_run
from skyrl_async.report.content import Known, RunContent
from skyrl_async.report.server import ReportServer
from skyrl_async.report.writing import write_report

STEPS, QUICK_STEPS = 10_000, 2_000
REPEATS = 5
MAX_DRAWN_S = 1.0


def drawn(driver: Any, address: str) -> tuple[float, list[Loaded]]:
    """Return the median seconds until a page is drawn, and all loads."""
    loads = [load(driver, address) for _ in range(REPEATS)]
    return statistics.median(page.drawn_s for page in loads), loads


def timed_write(folder: Path) -> tuple[float, Path]:
    """Return the median seconds of writing the report, and its path."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        path = write_report(folder)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), path


def poll_seconds(folder: Path) -> tuple[float, float]:
    """Return the seconds of the server's first look at a run, and of one with nothing new."""
    content = RunContent(folder)
    started = time.perf_counter()
    whole = content.read()
    first = time.perf_counter() - started
    series = whole["series"]
    known = Known(
        stride=series["stride"],
        buckets=series["rows"] // series["stride"],
        parts=whole["parts"],
    )
    started = time.perf_counter()
    content.read(known)
    return first, time.perf_counter() - started


def main() -> None:
    args = parse_args(__doc__ or "")
    started = time.perf_counter()
    steps = QUICK_STEPS if args.quick else STEPS
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        write_run(folder, steps=steps)
        write_s, path = timed_write(folder)
        first_s, again_s = poll_seconds(folder)
        server = ReportServer(folder)
        with browser() as driver:
            report_s, loads = drawn(driver, path.as_uri())
            live_s, live_loads = drawn(driver, server.start())
        server.close()
        figures = {
            "steps": steps,
            "metrics_mb": round((folder / "metrics.jsonl").stat().st_size / 1e6, 1),
            "write_s": round(write_s, 3),
            "report_kb": round(path.stat().st_size / 1e3),
            "report_drawn_s": round(report_s, 3),
            "live_drawn_s": round(live_s, 3),
            "live_first_read_s": round(first_s, 3),
            "live_later_read_s": round(again_s, 4),
            "requests": sum(len(page.requests) for page in loads),
        }
    for name, value in figures.items():
        print(f"{name:20} {value}")
    misses = []
    for name in ("report_drawn_s", "live_drawn_s"):
        if figures[name] >= MAX_DRAWN_S:
            misses.append(f"{name} is {figures[name]}, target below {MAX_DRAWN_S}")
    if figures["requests"]:
        misses.append(f"the report asked for {figures['requests']} other addresses, target none")
    problems = [p for page in (*loads, *live_loads) for p in page.problems]
    misses += [f"the browser said: {problem}" for problem in problems]
    finish("report_page", figures, misses, started, args.output)


if __name__ == "__main__":
    main()
