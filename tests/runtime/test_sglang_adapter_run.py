"""A whole run that loads each published adapter into a real SGLang server, also into a new one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from skyrl_async.rollout.engine_launch import MIN_ADAPTER_VERSION, is_recent
from tests.runtime.launch import finish as finish_run
from tests.runtime.launch import metrics_of, output_of, processes_mentioning, start, wait_until

pytest_plugins = ("tests.sglang_server",)
pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(400)]

ADAPTED = (
    *("engine.kind=sglang", "sampling.max_tokens=4", "logging.tensorboard=false"),
    *("runtime=local", "lora.rank=4", "lora.publish=adapter", "optimizer.learning_rate=0.01"),
    *("evaluation.num_tasks=4", "staleness.max=2"),
)


def python_for_adapters(sglang_settings, tmp_path) -> Path:
    from skyrl_async.rollout.engine_launch import check_version

    settings = sglang_settings(tmp_path / "server.log")
    version = asyncio.run(check_version(settings))
    if not is_recent(version, minimum=MIN_ADAPTER_VERSION):
        pytest.skip(f"SGLang {version} cannot unload adapters reliably")
    return settings.python


def joined(folder: Path) -> int:
    path = folder / "run.log"
    return path.read_text().count("engine 0 joined the pool") if path.exists() else 0


def server_group(folder: Path) -> int:
    """Return the process group of the server, which its first process leads."""
    for pid in processes_mentioning(str(folder / "engines" / "engine_0" / "model")):
        if os.getpgid(pid) == pid and b"launch_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no server:\n{output_of(folder)}")


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_trains_with_adapters_alone_and_a_new_server_gets_the_newest(tmp_path, sglang_settings, kv):
    python = python_for_adapters(sglang_settings, tmp_path)
    folder = tmp_path / "run"
    process = start(
        folder,
        *ADAPTED,
        *(f"engine.python={python}", f"engine.kv_after_swap={kv}", "run.steps=100000"),
    )
    try:
        wait_until(lambda: len(metrics_of(folder)) >= 8, timeout_s=200, what="8 steps")
        os.killpg(server_group(folder), signal.SIGKILL)
        steps = len(metrics_of(folder))
        wait_until(lambda: joined(folder) == 2, timeout_s=120, what="a new server has joined")
        wait_until(
            lambda: len(metrics_of(folder)) >= steps + 8, timeout_s=60, what="training goes on"
        )
    finally:
        process.send_signal(signal.SIGINT)
    summary = finish_run(process, folder, timeout_s=60)

    assert summary["status"] == "interrupted", output_of(folder)
    assert summary["dropped"] == {} and summary["failed_members"] == {}
    assert summary["staleness_observed_max"] <= 2
    metrics = metrics_of(folder)
    mismatch = [m["offpolicy/mismatch_kl"] for m in metrics if "offpolicy/mismatch_kl" in m]
    assert mismatch and max(map(abs, mismatch)) < 1e-6, "float32 on both sides"
    # Both sides, of rank 4 in float32, of q, k, v, o, gate, up and down in each of two blocks.
    sides = 16 + 16 + 16 + 8 + 16 + 8 + 16 + 16 + 16 + 32 + 16 + 32 + 32 + 16
    assert {m["sync/bytes"] % (2 * 4 * 4 * sides) for m in metrics} == {0}
    assert sum(m["sync/bytes"] for m in metrics) > 0
    log = (folder / "engines" / "engine_0" / "server.log").read_text()
    assert log.count("Lora name=v0,") == 1, "the new server got the newest version only"
    assert "Start unload Lora adapter. Lora name=v1" in log
