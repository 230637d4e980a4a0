"""Real runs that are killed, interrupted or out of disk space, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skyrl_async.checkpoint import newest_whole
from tests.runtime.forked_run import start_forked
from tests.runtime.launch import (
    ROOT,
    finish,
    metrics_of,
    output_of,
    processes_of_session,
    run_here,
    start,
    wait_until,
)

EVERY = 4
RESUMED = ("run.resume=auto", f"checkpoint.every_steps={EVERY}", "logging.tensorboard=false")


def last_step(folder: Path) -> int:
    return max((row["step"] for row in metrics_of(folder)), default=0)


def newest_step(folder: Path) -> int:
    found, _ = newest_whole(folder / "checkpoints")
    return 0 if found is None else found[1].step


def kill_after(folder: Path, steps: int, *overrides: str) -> int:
    """Start a run, kill all of it when it has recorded so many steps; return the last of them."""
    begin = start if "runtime=ray" in overrides else start_forked
    process = begin(folder, *RESUMED, *overrides, "run.steps=100000")
    try:
        wait_until(
            lambda: last_step(folder) >= steps or process.poll() is not None,
            timeout_s=120,
            what=f"step {steps}",
        )
        assert process.poll() is None, output_of(folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not processes_of_session(process.pid), timeout_s=20, what="all are dead")
    return last_step(folder)


def check_rows(rows: list[dict[str, Any]], *, steps: int) -> None:
    """Every step is there once, and everything counts on, across all processes of the run."""
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["policy_version"] for row in rows] == list(range(1, steps + 1))
    assert [row["optimizer_steps"] for row in rows] == list(range(2, 2 * steps + 1, 2))
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)
    assert all(row["staleness/max"] <= 2 for row in rows)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param("runtime=local", marks=pytest.mark.slow),
        pytest.param("runtime=ray", marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_a_run_that_is_killed_twice_goes_on_each_time(tmp_path: Path, runtime: str):
    folder = tmp_path / "run"
    first = kill_after(folder, EVERY + 2, runtime)
    assert first - newest_step(folder) <= EVERY
    kept = newest_step(folder)
    assert kept >= EVERY
    second = kill_after(folder, first + EVERY + 2, runtime)
    assert second - newest_step(folder) <= EVERY
    steps = second + 3

    process = start(folder, *RESUMED, runtime, f"run.steps={steps}")
    summary = finish(process, folder, timeout_s=120)
    assert (summary["status"], summary["steps"]) == ("finished", steps), output_of(folder)
    rows = metrics_of(folder)
    check_rows(rows, steps=steps)
    assert summary["trajectories_trained"] == 16 * steps
    assert summary["tokens_generated"] >= 16 * steps
    assert summary["seconds"] >= rows[-1]["time_s"]
    assert summary["resumed_from_step"] >= kept
    assert newest_step(folder) == steps
    assert len(list((folder / "checkpoints").iterdir())) == 2
    log = (folder / "run.log").read_text()
    assert log.count("goes on from ") == 2 and log.count("starts anew") == 1


def test_an_interrupted_run_keeps_its_last_step(tmp_path: Path):
    folder = tmp_path / "run"
    process = start_forked(folder, "runtime=local", *RESUMED[1:], "run.steps=100000")
    wait_until(lambda: last_step(folder) >= 2, timeout_s=60, what="it trains")
    process.send_signal(signal.SIGTERM)
    summary = finish(process, folder, timeout_s=8)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 128 + signal.SIGTERM)
    assert summary["steps"] == last_step(folder) == newest_step(folder) >= 2

    steps = summary["steps"] + 2
    more = run_here(folder, *RESUMED, f"run.steps={steps}")
    assert (more["status"], more["resumed_from_step"]) == ("finished", summary["steps"])
    check_rows(metrics_of(folder), steps=steps)
    assert (
        json.loads((folder / "set_aside" / "001" / "summary.json").read_text())["steps"]
        == (summary["steps"])
    )


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupt_does_not_wait_for_a_step_that_takes_long(tmp_path: Path, signals: int):
    """Not beyond its time, and at a second signal not at all."""
    folder = tmp_path / "run"
    wait_s = 1 if signals == 1 else 1000
    process = start_forked(
        folder,
        *("runtime=local", "logging.tensorboard=false", "learner.num_epochs=100000"),
        *(f"checkpoint.interrupt_timeout_s={wait_s}", "learner.step_timeout_s=100"),
    )
    wait_until(lambda: "playing" in output_of(folder), timeout_s=60, what="it plays")
    time.sleep(1)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    summary = finish(process, folder, timeout_s=10)
    assert (summary["status"], summary["exit_code"], summary["steps"]) == ("interrupted", 130, 0)
    assert newest_step(folder) == 0


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_under_its_name_and_keeps_what_was_whole(tmp_path: Path):
    folder = tmp_path / "run"
    run_here(folder, *RESUMED, "run.steps=2", "checkpoint.keep=1")
    assert newest_step(folder) == 2
    process = start_forked(
        folder,
        *("runtime=local", *RESUMED, "run.steps=100", "checkpoint.keep=1"),
        largest_file_bytes=65536,
    )
    summary = finish(process, folder, timeout_s=60)
    assert summary["exit_code"] == 1, output_of(folder)
    assert summary["status"] == "failed"
    assert summary["error"].startswith("checkpoint: step 4 could not be written to ")
    assert "File too large" in summary["error"]
    assert "the newest checkpoint there is step-000002" in summary["error"]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    # With room again it goes on.
    assert run_here(folder, *RESUMED, "run.steps=5")["status"] == "finished"
    check_rows(metrics_of(folder), steps=5)


def test_another_run_goes_on_from_a_checkpoint_with_other_settings(tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    run_here(old, *RESUMED, "run.steps=6", "logging.tensorboard=true")
    before = metrics_of(old)
    changed = ("staleness.max=0", "optimizer.learning_rate=1e-4", "learner.groups_per_step=2")
    summary = run_here(
        new,
        *(f"run.resume={old / 'checkpoints' / 'step-000004'}", "run.steps=7", *changed),
        *("logging.tensorboard=true", "weight_sync.transport=disk"),
    )
    assert (summary["status"], summary["steps"]) == ("finished", 7)
    rows = metrics_of(new)
    check_rows(rows, steps=7)
    assert rows[:4] == before[:4] and rows[4] != before[4]
    assert [row["policy/lr"] for row in rows[4:]] == [pytest.approx(1e-4)] * 3
    assert [row["staleness/max"] for row in rows[4:]] == [0, 0, 0]
    assert summary["trajectories_trained"] == 4 * 16 + 3 * 8
    assert metrics_of(old) == before
    again = run_here(new, "run.resume=auto", "run.steps=8", *changed, "weight_sync.transport=disk")
    assert (again["status"], again["steps"]) == ("finished", 8)


def test_synchronous_training_goes_on_alike_each_time(tmp_path: Path):
    """K = 0 leaves nothing to chance, so two runs that go on from one checkpoint are equal."""
    run_here(tmp_path / "first", *RESUMED, "run.steps=4", "staleness.max=0")
    values = []
    for name in ("a", "b"):
        resume = f"run.resume={tmp_path / 'first'}"
        run_here(tmp_path / name, resume, "run.steps=7", "staleness.max=0")
        names = ("reward/mean", "loss/policy", "policy/grad_norm", "learner/loss_tokens")
        values.append([[row[n] for n in names] for row in metrics_of(tmp_path / name)])
    assert values[0] == values[1] and len(values[0]) == 7


@pytest.mark.parametrize(
    "keys",
    [
        ("critic.kind=head", "algorithm.advantage=gae"),
        ("critic.kind=model", "algorithm.advantage=gae"),
        ("guard.enabled=true", "guard.patience_steps=1", "guard.min_ess_fraction=0.9999"),
        ("kl.coefficient=0.1", "replay.max_times_sampled=2", "replay.selector=uniform"),
        ("lora.rank=4",),
    ],
)
def test_everything_that_training_keeps_comes_back(tmp_path: Path, keys: tuple[str, ...]):
    folder = tmp_path / "run"
    run_here(folder, *RESUMED, "run.steps=5", *keys)
    summary = run_here(folder, *RESUMED, "run.steps=9", *keys)
    assert (summary["status"], summary["steps"]) == ("finished", 9)
    assert [row["step"] for row in metrics_of(folder)] == list(range(1, 10))


@pytest.mark.slow
def test_a_policy_is_exported_from_a_checkpoint_as_the_run_exports_its_last(tmp_path: Path):
    from safetensors.torch import load_file

    folder, exported = tmp_path / "run", tmp_path / "exported"
    summary = run_here(folder, *RESUMED, "run.steps=3")
    command = [sys.executable, str(ROOT / "launchers" / "export.py"), str(folder), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "step-000003" in done.stdout
    ours, own = (load_file(f / "model.safetensors") for f in (exported, folder / "policy"))
    assert ours.keys() == own.keys() and all((ours[name] == own[name]).all() for name in own)
    assert {p.name for p in exported.iterdir()} == {p.name for p in (folder / "policy").iterdir()}

    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "exists; give a folder that does not" in again.stderr

    evaluated = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launchers" / "evaluate.py"), str(exported)),
            *("--config", str(folder / "config.yaml"), "run.resume=never"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    reward = json.loads(evaluated.stdout.splitlines()[-1])["reward_mean"]
    assert reward == summary["eval_reward_final"]


def test_an_exported_policy_has_its_adapters_merged_and_the_type_that_was_asked_for(tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    from skyrl_async.runtime.export import export_policy

    folder = tmp_path / "run"
    run_here(folder, *RESUMED, "run.steps=3", "lora.rank=4", "optimizer.learning_rate=0.05")
    checkpoint = export_policy(folder, tmp_path / "exported", dtype="bfloat16")
    assert checkpoint == folder / "checkpoints" / "step-000003"
    ours = load_file(tmp_path / "exported" / "model.safetensors")
    own = load_file(folder / "policy" / "model.safetensors")
    assert ours.keys() == own.keys()
    for name, weight in own.items():
        assert torch.equal(ours[name], weight.to(torch.bfloat16)), name
    assert (tmp_path / "exported" / "adapter").is_dir()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_another_number_of_ranks_and_shards(tmp_path: Path):
    folder = tmp_path / "run"
    run_here(folder, *RESUMED, "run.steps=3")
    for steps, keys in (
        (5, ("learner.num_ranks=2", "learner.shard_ranks=2")),
        (7, ("learner.num_ranks=2", "learner.shard_ranks=1")),
    ):
        process = start(folder, "runtime=ray", *RESUMED, f"run.steps={steps}", *keys)
        summary = finish(process, folder, timeout_s=150)
        assert (summary["status"], summary["steps"]) == ("finished", steps), output_of(folder)
    summary = run_here(folder, *RESUMED, "run.steps=9")
    assert (summary["status"], summary["steps"]) == ("finished", 9)
    check_rows(metrics_of(folder), steps=9)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_does_not_join_a_cluster_that_it_finds_on_its_machine(tmp_path: Path):
    """That of a run which was just killed would still be there for a moment."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        folder = tmp_path / "run"
        process = start(folder, "runtime=ray", *RESUMED, "run.steps=2", RAY_ADDRESS=cluster.address)
        summary = finish(process, folder, timeout_s=100)
        assert summary["status"] == "finished", output_of(folder)
    finally:
        cluster.shutdown()
