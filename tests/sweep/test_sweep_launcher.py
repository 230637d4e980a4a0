"""The command line of sweeps."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.launch import ROOT, processes_of_session, wait_until

LAUNCHER = ROOT / "launchers" / "sweep.py"
LAB = ROOT / "launchers" / "sweeps" / "lab_staleness.yaml"


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCHER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_axes_can_be_given_without_a_file(tmp_path: Path):
    done = sweep(
        *("--axis", "method=grpo,m2po", "--axis", "lag=0,8", "--axis", "seed=0"),
        *("--output", str(tmp_path), "--dry-run", "run.steps=3"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "method=grpo lag=0 seed=0",
        "method=grpo lag=8 seed=0",
        "method=m2po lag=0 seed=0",
        "method=m2po lag=8 seed=0",
    ]


def test_the_labs_grid_has_eight_methods_and_its_order_makes_every_prefix_useful():
    done = sweep(str(LAB), "--output", "unused", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [dict(word.split("=") for word in x.split()) for x in done.stdout.splitlines()]
    methods = {line["method"] for line in lines}
    lags = {int(line["lag"]) for line in lines}
    assert len(methods) >= 8
    assert {0, 1, 2, 4, 8, 16, 64, 256} <= lags
    first = [line for line in lines if line["seed"] == "0" and int(line["lag"]) <= 16]
    assert lines[: len(first)] == first
    for method in methods:
        for lag in (0, 8):
            seeds = {x["seed"] for x in lines if (x["method"], x["lag"]) == (method, str(lag))}
            assert len(seeds) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "x"], "no runs"),
        (["--output", "x", "--axis", "lag"], "write --axis NAME=V1,V2"),
        (["--output", "x", "--axis", "lag=0", "--max-seconds", "9999"], "at most 2700"),
        (["missing.yaml", "--output", "x"], "missing.yaml"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], words: str):
    done = sweep(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_wrong_cell_is_refused_before_anything_runs(tmp_path: Path):
    done = sweep("--axis", "learner.num_rank=1", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "num_ranks" in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path):
    with open(tmp_path / "sweep.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sweep("--axis", "seed=0", "--output", str(tmp_path), "runtime=local")
    assert done.returncode == 2
    assert "another sweep is running" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_sweep_and_its_run(number: signal.Signals, tmp_path: Path):
    command = (
        *("--axis", "seed=0", "--output", str(tmp_path), "runtime=local", "run.steps=100000"),
        *("environment.in_process=true", "model.hidden_size=16", "model.num_heads=2"),
    )
    process = subprocess.Popen([sys.executable, str(LAUNCHER), *command], start_new_session=True)
    try:
        wait_until(
            lambda: any(tmp_path.glob("cells/*/run/metrics.jsonl")),
            timeout_s=60,
            what="the first step",
        )
        process.send_signal(number)
        assert process.wait(20) == 130
        wait_until(
            lambda: processes_of_session(process.pid) == [], timeout_s=10, what="all have ended"
        )
    finally:
        process.kill()
    assert not (tmp_path / "rows.jsonl").exists()
