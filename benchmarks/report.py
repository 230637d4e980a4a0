"""What every benchmark has in common: its arguments and its last line, one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of ``quick`` (bool) and ``output`` (path or None), to add more to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less than a minute, rougher figures")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    return parser


def parse_args(description: str) -> argparse.Namespace:
    """Return ``quick`` (bool) and ``output`` (path or None)."""
    return argument_parser(description).parse_args()


def finish(
    name: str,
    figures: Mapping[str, Any],
    misses: Sequence[str],
    started: float,
    output: Path | None,
) -> None:
    """Print the result as one line of JSON, and write it to ``output``.

    Args:
        name: of the benchmark.
        figures: what was measured; values that JSON can hold.
        misses: one sentence per target that was not reached.
        started: ``time.perf_counter()`` at the start.
        output: file to write, if any.
    """
    result = {
        "benchmark": name,
        "commit": commit(),
        "hardware": _hardware(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": _command(),
        "seconds": round(time.perf_counter() - started, 1),
        "misses": list(misses),
        **figures,
    }
    line = json.dumps(result)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n")
    print(line)


def _command() -> str:
    """Return what repeats this, without where the result went and with interpreters unnamed."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    words = [str(script.relative_to(root)) if script.is_relative_to(root) else script.name]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "--output":
            if not value:
                next(arguments, None)
        elif name.endswith("-python"):
            if not value:
                next(arguments, None)
            words.append(f"{name} PATH")
        else:
            words.append(shlex.quote(word))
    return " ".join(("python", *words))


def commit() -> str:
    """Return the commit that is checked out, with ``-dirty`` if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return answer.stdout.strip() or "unknown"


def _hardware() -> str:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (x for x in cpuinfo.read_text().splitlines() if x.startswith("model name"))
        model = next(names, model).partition(":")[2].strip() or model
    return f"{model}, {os.cpu_count()} cores"
