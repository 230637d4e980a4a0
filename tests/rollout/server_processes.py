"""An interpreter with a fake SGLang, and a look at which processes are left."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skyrl_async.rollout.engine_process import EngineProcess, EngineStartError, ServerSettings

FAKE_SERVER = Path(__file__).with_name("fake_sglang_server.py")
VANISH_S = 10.0


def fake_python(folder: Path, *, version: str | None = "0.5.21") -> Path:
    """Return an interpreter whose ``sglang`` is the fake server; without one if no version."""
    modules = folder / "modules"
    modules.mkdir(parents=True)
    if version is not None:
        (modules / "sglang").mkdir()
        (modules / "sglang" / "__init__.py").write_text(
            "import sys; assert 'launch_server' in str(sys.orig_argv), 'nobody may import this'\n"
        )
        shutil.copy(FAKE_SERVER, modules / "sglang" / "launch_server.py")
        record = modules / f"sglang-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Name: sglang\nVersion: {version}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} -S "$@"\n')
    python.chmod(0o700)
    return python


def fake_settings(folder: Path, *, fake: str = "well", **changes: Any) -> ServerSettings:
    """Return the settings of a fake server that behaves as told."""
    values: dict[str, Any] = {
        "model_path": folder / "model",
        "log_path": folder / "server.log",
        "device": "cpu",
        "start_timeout_s": 30.0,
        "extra_args": ("--fake", fake),
    }
    if "python" not in changes:
        values["python"] = fake_python(folder / "fake")
    return ServerSettings(**(values | changes))


def processes_in(log_path: Path) -> list[int]:
    """Return the processes that fake servers say in their log that they consist of."""
    lines = log_path.read_text().splitlines()
    return [int(p) for line in lines if line.startswith("processes ") for p in line.split()[1:]]


def alive(pids: list[int]) -> list[int]:
    """Return those that run; a process that has ended and was not reaped does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def group_of(leader: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = (folder / "stat").read_text().rpartition(")")[2].split()[2]
        except OSError:
            continue
        if int(group) == leader:
            members.append(int(folder.name))
    return alive(members)


def assert_vanish(pids: list[int]) -> None:
    """Wait for the end of processes that were killed without anybody waiting for that."""
    assert pids
    deadline_s = time.monotonic() + VANISH_S
    while left := alive(pids):
        assert time.monotonic() < deadline_s, f"processes {left} are still there"
        time.sleep(0.02)


def run_async(body, *, timeout_s: float = 60.0):
    """Return the result of a coroutine function, with a deadline."""

    async def bounded():
        async with asyncio.timeout(timeout_s):
            return await body()

    return asyncio.run(bounded())


def start_error(settings: ServerSettings) -> EngineStartError:
    with pytest.raises(EngineStartError) as caught:
        run_async(EngineProcess(settings).start)
    return caught.value
