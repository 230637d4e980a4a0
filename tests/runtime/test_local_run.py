"""Whole runs in one process: it learns, it is repeatable, it leaves what it promises."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skyrl_async.timeline.arrows import arrows
from skyrl_async.timeline.reader import read_trace
from tests.runtime.launch import (
    ROOT,
    finish,
    metrics_of,
    processes_mentioning,
    processes_of_session,
    run_here,
    start,
    wait_until,
)


def test_the_whole_loop_learns_asynchronously(tmp_path: Path):
    folder = tmp_path / "run"
    summary = run_here(
        folder,
        "run.steps=120",
        "model.hidden_size=64",
        "model.num_heads=4",
        "learner.groups_per_step=8",
        "rollout.group_size=8",
        "environment.name=largest_digit",
        "sampling.max_tokens=2",
        "staleness.max=2",
        "optimizer.learning_rate=3e-3",
        "logging.tensorboard=false",
    )
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)
    rows = metrics_of(folder)
    # A step has a reward if a group finished since the one before.
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    first = sum(rewards[:10]) / 10
    assert first < 0.25
    assert summary["reward_final"] > first + 0.2
    assert 0 < summary["staleness_observed_max"] <= summary["staleness_configured_max"] == 2
    assert any(row["offpolicy/clip_fraction"] > 0 for row in rows)


def test_a_run_leaves_what_it_promises(tmp_path: Path):
    folder = tmp_path / "run"
    samples = ("logging.samples_every_steps=2", "logging.samples_per_step=2")
    summary = run_here(folder, "run.steps=3", "seed=5", "evaluation.every_steps=2", *samples)
    assert summary["exit_code"] == 0
    for name in (
        *("status", "steps", "seconds", "startup_seconds", "reward_final", "eval_reward_final"),
        *("trajectories_trained", "tokens_generated", "staleness_observed_max"),
        *("staleness_configured_max", "dropped", "seed"),
    ):
        assert name in summary, name
    assert (summary["steps"], summary["seed"], summary["trajectories_trained"]) == (3, 5, 48)
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for role in ("learner", "engine", "actor"):
        of_steps = [[v for k, v in row.items() if k.startswith(f"idle/{role}/")] for row in rows]
        # A step may end before the next report of a worker.
        shares = [sum(parts) for parts in of_steps[1:] if parts]
        assert shares and shares == pytest.approx([1] * len(shares), abs=1e-6), role
    for name in (
        *("policy_version", "live_version", "optimizer_steps", "time_s", "reward/mean"),
        *("reward/std", "reward/trained_mean", "staleness/mean", "staleness/p95", "staleness/max"),
        *("staleness/lost_generation_fraction", "staleness/masked_fraction"),
        *("offpolicy/ess_fraction", "offpolicy/importance_weight_mean", "offpolicy/kl_behavior"),
        *("offpolicy/importance_weight_max", "offpolicy/clip_fraction", "loss/policy"),
        *("throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s"),
        *("throughput/trajectories_per_s", "sync/stall_s", "sync/transfer_s", "sync/bytes"),
        *("sync/reprefilled_tokens", "sync/versions_skipped", "buffer/groups", "buffer/bytes"),
        *("policy/entropy", "policy/grad_norm", "policy/lr"),
    ):
        assert any(name in row for row in rows), name
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 5
    assert (folder / "run.log").exists()
    assert '"status":"finished"' in (folder / "report.html").read_text()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["train_version"] for sample in samples} == {0, 2}
    assert len(samples) == 2 * 2
    assert list((folder / "tensorboard").iterdir())

    assert set(summary["idle"]) == {"learner", "engine", "actor"}
    assert all(sum(s.values()) == pytest.approx(1) for s in summary["idle"].values())
    assert summary["largest_waste"] is None or summary["largest_waste"]["knob"]
    check_timeline(folder)

    evaluated = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launchers" / "evaluate.py"),
            str(folder / "policy"),
            "evaluation.num_tasks=4",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["reward_mean"] == summary["eval_reward_final"]
    assert result["num_tasks"] == 4


def check_timeline(folder: Path) -> None:
    """Assert that every role of a run of three steps is on its timeline."""
    trace = read_trace(folder)
    names = {lane.role: {span.name for span in lane.spans} for lane in trace.lanes}
    parts = {"wait", "prepare", "train", "step", "snapshot", "forward", "backward"}
    assert parts < names["learner"] and {"decode", "swap"} <= names["engine"]
    assert names["publisher"] == {"transfer"} and "decode" in names["evaluation"]
    slots = [lane for lane in trace.lanes if lane.role == "slot"]
    assert len(slots) == 16 and all(lane.process == "rollout actor 0" for lane in slots)
    played = {span.name for lane in slots for span in lane.spans}
    assert {"generate", "environment", "wait_group"} <= played
    ways = [(a.policy_version, len(a.stops)) for a in arrows(trace)]
    assert ways == [(1, 3), (2, 3), (3, 3)]


def test_synchronous_training_is_repeatable_over_any_transport(tmp_path: Path):
    """K = 0 leaves nothing to chance: a second run, and another transport, give equal numbers."""
    values = {}
    for name, transport in (("a", "collective"), ("b", "collective"), ("c", "disk")):
        folder = tmp_path / name
        summary = run_here(
            folder,
            "run.steps=4",
            "staleness.max=0",
            f"weight_sync.transport={transport}",
            "logging.tensorboard=false",
            f"logging.trace={str(name == 'a').lower()}",
        )
        assert summary["exit_code"] == 0
        assert (folder / "trace").exists() == (name == "a")
        names = ("reward/mean", "loss/policy", "policy/grad_norm", "learner/loss_tokens")
        values[name] = [[row[n] for n in names] for row in metrics_of(folder)]
        assert all(row["staleness/max"] == 0 for row in metrics_of(folder))
    assert values["a"] == values["b"] == values["c"]


def test_ctrl_c_stops_within_five_seconds_and_says_so(tmp_path: Path):
    folder = tmp_path / "run"
    process = start(folder, "runtime=local", "run.steps=100000")
    wait_until(lambda: len(metrics_of(folder)) >= 2, timeout_s=60, what="it trains")
    process.send_signal(signal.SIGINT)
    summary = finish(process, folder, timeout_s=5)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 130)
    assert processes_of_session(process.pid) == []


FAULTY = """
import math, random, time

class Faulty:
    def __init__(self, *, fault="none", share=0.3):
        self._fault, self._share = fault, share
    def reset(self, *, seed=None, options=None):
        self._seed = seed
        return "guess a number", {}
    def step(self, action):
        if random.Random(f"{self._seed} {action}").random() < self._share:
            if self._fault == "raise":
                raise RuntimeError("broken on purpose")
            if self._fault == "hang":
                time.sleep(1000)
            if self._fault == "nan":
                return "higher", math.nan, True, False, {}
            if self._fault == "flood":
                return "higher " * 100000, 0.0, True, False, {}
        return "correct", 1.0, True, False, {}
"""


@pytest.fixture
def faulty_games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that no other test has imported, for this process and its children."""
    name = f"faulty_games_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return f"{name}:Faulty"


@pytest.mark.parametrize(
    ("fault", "reason", "share"),
    [
        ("raise", "environment_error", 0.3),
        ("nan", "nonfinite_reward", 0.3),
        ("flood", "overlong_observation", 0.3),
        ("hang", "step_timeout", 0.1),
    ],
)
def test_a_faulty_environment_costs_its_own_trajectories_only(
    tmp_path: Path, faulty_games: str, fault: str, reason: str, share: float
):
    summary = run_here(
        tmp_path / "run",
        "run.steps=3",
        f"environment.name={faulty_games}",
        "environment.in_process=false",
        "environment.step_timeout_s=0.3",
        f"environment.options.fault={fault}",
        f"environment.options.share={share}",
        "evaluation.num_tasks=0",
        "logging.tensorboard=false",
    )
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert set(summary["failed_members"]) == {reason}
    assert processes_mentioning(str(tmp_path)) == []


def test_an_environment_that_always_fails_ends_the_run_with_its_cause(
    tmp_path: Path, faulty_games: str
):
    summary = run_here(
        tmp_path / "run",
        f"environment.name={faulty_games}",
        "environment.options.fault=raise",
        "environment.options.share=1.0",
        "logging.tensorboard=false",
    )
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert "broken on purpose" in summary["error"]
