"""``python -m skyrl_async.timeline RUN`` writes ``timeline.json`` and ``timeline.html`` there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from skyrl_async.timeline.chrome import chrome_trace
from skyrl_async.timeline.page import page
from skyrl_async.timeline.reader import Trace, read_trace
from skyrl_async.timeline.shares import role_shares


def main(arguments: list[str] | None = None) -> int:
    """Write the timeline of a run in both forms; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m skyrl_async.timeline", description="Draw the timeline of a run."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--output", type=Path, help="folder to write timeline.json and timeline.html to: the run's"
    )
    options = parser.parse_args(arguments)
    run: Path = options.run
    if not run.is_dir():
        print(f"{run}: no such folder; give the folder of a run", file=sys.stderr)
        return 2
    trace = read_trace(run)
    if not trace.lanes:
        print(
            f"{run}: has no timeline in {run / 'trace'}; it is written with logging.trace=true",
            file=sys.stderr,
        )
        return 2
    write_timeline(trace, run, options.output or run)
    print(f"timeline  {options.output or run}/timeline.html")
    print(f"          {options.output or run}/timeline.json (Perfetto, chrome://tracing)")
    return 0


def write_timeline(trace: Trace, run: Path, folder: Path) -> None:
    """Write both files and print each role's shares.

    Args:
        trace: of the run.
        run: its folder.
        folder: to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(chrome_trace(trace), allow_nan=False, separators=(",", ":"))
    (folder / "timeline.json").write_text(text + "\n", encoding="utf-8")
    title = f"Timeline of {run.resolve().name}"
    (folder / "timeline.html").write_text(page(trace, title=title, note=_note(run)), "utf-8")
    for role, shares in role_shares(trace).items():
        parts = sorted(shares.items(), key=lambda item: -item[1])
        print(f"{role:<11}" + "  ".join(f"{name} {100 * share:.0f} %" for name, share in parts))
    for process, before_s in trace.gaps:
        print(f"{process}: events before {before_s:.1f} s are missing, they came too fast")


def _note(run: Path) -> str:
    """Return the largest waste of a run that has ended, in words."""
    try:
        waste = json.loads((run / "summary.json").read_text(encoding="utf-8"))["largest_waste"]
        return f"Largest waste: {waste['text']}." if waste else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
