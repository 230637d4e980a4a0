"""Writes ``report.html`` of a run or of a sweep."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from skyrl_async.report.content import RunContent
from skyrl_async.report.page import render
from skyrl_async.report.run_files import is_run
from skyrl_async.report.sweep_content import sweep_content
from skyrl_async.run_folder import write_atomically
from skyrl_async.sweep.rows import ROWS

logger = logging.getLogger(__name__)

NAME = "report.html"


def write_report(folder: Path, *, output: Path | None = None) -> Path:
    """Write the report of a run or of a sweep, complete or not at all; return its path.

    Args:
        folder: of the run, or of the sweep.
        output: file to write; ``report.html`` in the folder by default.

    Raises:
        ValueError: if the folder holds neither.
        OSError: if the report cannot be written.
    """
    folder = folder.resolve()
    path = output or folder / NAME
    if (folder / ROWS).is_file():
        content = sweep_content(folder)
    elif is_run(folder):
        content = RunContent(folder).read()
    else:
        raise ValueError(
            f"{folder}: holds no run (config.yaml, metrics.jsonl) and no sweep ({ROWS})"
        )
    write_atomically(path, render(content))
    return path


def write_report_in_time(folder: Path, *, timeout_s: float) -> Path | None:
    """Write the report of a run that ends; return None, and log why, where it fails or takes long.

    Args:
        folder: of the run.
        timeout_s: after which it is no longer waited for.
    """
    written: list[Path] = []

    def write() -> None:
        try:
            written.append(write_report(folder))
        except Exception as error:
            logger.warning("the report could not be written: %s", error)
            logger.info("where that failed", exc_info=True)

    thread = threading.Thread(target=write, name="report", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        command = f"python -m skyrl_async.report {folder}"
        logger.warning("the report takes longer than %.1f s; write it by %s", timeout_s, command)
        return None
    return written[0] if written else None
