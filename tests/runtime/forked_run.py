"""Runs whose process is forked from one that has loaded what a run needs, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.runtime.launch import LAUNCHER, SMALL


class ForkedRun:
    """The process of a run, with what is used here of ``subprocess.Popen``."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(LAUNCHER.name, timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def start_forked(
    folder: Path, *overrides: str, largest_file_bytes: int = resource.RLIM_INFINITY
) -> ForkedRun:
    """Start a small run as ``start`` does, in a process that runs the launcher as its script.

    Args:
        folder: of the run; the output goes to ``<folder>.out``.
        *overrides: of the configuration.
        largest_file_bytes: what the process can write to one file.
    """
    argv = [str(LAUNCHER), *SMALL, f"run.dir={folder}", *overrides]
    output = folder.with_suffix(".out")
    output.touch()
    # A daemon does not outlive a test that failed.
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_launch, args=(argv, output, largest_file_bytes), daemon=True)
    process.start()
    return ForkedRun(process)


def _launch(argv: list[str], output: Path, largest_file_bytes: int) -> None:
    os.setsid()
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    os.environ.update(CI="true", OMP_NUM_THREADS="1")
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
