"""Whole runs with real SGLang servers, and what becomes of them when a server dies or hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from skyrl_async.timeline.arrows import arrows
from skyrl_async.timeline.reader import read_trace
from tests.runtime.launch import (
    finish,
    metrics_of,
    output_of,
    processes_mentioning,
    start,
    wait_until,
)
from tests.weight_sync.real_server import restored

pytest_plugins = ("tests.sglang_server",)
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

SERVED = ("engine.kind=sglang", "sampling.max_tokens=4", "logging.tensorboard=false")
TWO = (*SERVED, "runtime=local", "engine.num_engines=2", "evaluation.num_tasks=0")


def start_served(folder: Path, python: Path, *overrides: str, **environment: str):
    return start(
        folder,
        *(*SERVED, f"engine.python={python}", *overrides),
        SKYRL_TEST_RUN=str(folder),
        **environment,
    )


def processes_of(folder: Path) -> list[int]:
    return processes_mentioning(f"SKYRL_TEST_RUN={folder}")


def server_of(folder: Path, engine: int) -> int:
    """Return the process group of an engine's server, which its first process leads."""
    model = str(folder / "engines" / f"engine_{engine}" / "model").encode()
    for pid in processes_mentioning(f"engine_{engine}"):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"launch_server" in command and model in command and os.getpgid(pid) == pid:
            return pid
    raise AssertionError(f"no server of engine {engine}:\n{output_of(folder)}")


def log_of(folder: Path) -> str:
    path = folder / "run.log"
    return path.read_text() if path.exists() else ""


def joined(folder: Path, engine: int) -> int:
    return log_of(folder).count(f"engine {engine} joined the pool")


def until(condition, folder: Path, process, *, timeout_s: float, what: str) -> None:
    """Wait for something that a run does; fail with its output if the run ends before."""

    def met() -> bool:
        assert process.poll() is None or condition(), output_of(folder) + log_of(folder)
        return bool(condition())

    wait_until(met, timeout_s=timeout_s, what=what)


def test_trains_under_ray_with_every_version_verified_and_leaves_no_process(
    tmp_path, sglang_python
):
    folder = tmp_path / "run"
    process = start_served(folder, sglang_python, "runtime=ray", "run.steps=4")
    summary = finish(process, folder, timeout_s=300)

    assert (summary["status"], summary["exit_code"]) == ("finished", 0), output_of(folder)
    assert summary["steps"] == 4 and summary["trajectories_trained"] == 64
    assert summary["staleness_observed_max"] <= summary["staleness_configured_max"]
    assert summary["dropped"] == {} and summary["failed_members"] == {}
    assert summary["eval_policy_version"] == 4
    assert set(summary["workers"]) == {"learner 0", "rollout actor 0", "engine 0"}
    mismatch = [
        m["offpolicy/mismatch_kl"] for m in metrics_of(folder) if "offpolicy/mismatch_kl" in m
    ]
    assert mismatch and max(map(abs, mismatch)) < 1e-6, "float32 on both sides"
    names: dict[str, set[str]] = {}
    trace = read_trace(folder)
    for lane in trace.lanes:
        names.setdefault(lane.process, set()).update(span.name for span in lane.spans)
    assert {"load", "swap"} <= names["engine 0"] and "decode" in names["rollout actor 0"]
    assert any(len(arrow.stops) == 3 for arrow in arrows(trace))
    wait_until(lambda: not processes_of(folder), timeout_s=15, what="all processes ended")


def test_a_killed_server_comes_back_verified_and_a_stopped_one_is_taken_out(
    tmp_path, sglang_python
):
    """One run; neither costs a trajectory, and training goes on with the other engine."""
    folder = tmp_path / "run"
    process = start_served(
        folder,
        sglang_python,
        *TWO,
        "run.steps=100000",
        "staleness.max=2",
        "engine.load_timeout_s=5",
    )

    def goes_on(without: int) -> None:
        until(
            lambda: f"engine {without} left the pool" in log_of(folder),
            folder,
            process,
            # A load that is under way may take its own time limit before a hang is seen.
            timeout_s=5 if without == 0 else 12,
            what=f"engine {without} has left the pool",
        )
        steps = len(metrics_of(folder))
        until(
            lambda: len(metrics_of(folder)) >= steps + 3,
            folder,
            process,
            timeout_s=60,
            what=f"training goes on without engine {without}",
        )

    try:
        until(lambda: len(metrics_of(folder)) >= 3, folder, process, timeout_s=200, what="3 steps")
        assert joined(folder, 0) == joined(folder, 1) == 1
        os.killpg(server_of(folder, 0), signal.SIGKILL)
        goes_on(without=0)
        until(lambda: joined(folder, 0) == 2, folder, process, timeout_s=120, what="it is back")
        assert joined(folder, 1) == 1, "the other one was there all the time"
        os.killpg(server_of(folder, 1), signal.SIGSTOP)
        goes_on(without=1)
    finally:
        process.send_signal(signal.SIGINT)
    summary = finish(process, folder, timeout_s=60)

    assert summary["status"] == "interrupted", output_of(folder)
    assert summary["dropped"] == {} and summary["failed_members"] == {}
    assert summary["staleness_observed_max"] <= 2
    wait_until(lambda: not processes_of(folder), timeout_s=15, what="all processes ended")


def test_trains_with_a_server_that_somebody_else_runs(tmp_path, sglang_server, tiny_model_folder):
    folder = tmp_path / "run"
    with restored(sglang_server, tiny_model_folder):
        process = start_served(
            folder,
            Path("null"),
            *("runtime=local", "run.steps=3", "engine.python=null", "evaluation.num_tasks=4"),
            f'engine.urls=["{sglang_server.url}"]',
            "engine.api_key_env=OUR_API_KEY",
            "engine.admin_key_env=OUR_ADMIN_KEY",
            "model.hidden_size=64",
            "model.num_heads=4",
            OUR_API_KEY=sglang_server.api_key,
            OUR_ADMIN_KEY=sglang_server.admin_key,
        )
        summary = finish(process, folder, timeout_s=200)

    assert (summary["status"], summary["exit_code"]) == ("finished", 0), output_of(folder)
    assert summary["steps"] == 3 and summary["failed_members"] == {}
    written = output_of(folder) + log_of(folder) + (folder / "config.yaml").read_text()
    assert sglang_server.api_key not in written and sglang_server.admin_key not in written
