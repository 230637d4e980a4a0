"""Whole runs whose engines or learner only take the time: all other parts are those of any run."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_async.plan.calibration import calibrate
from tests.runtime.launch import finish, metrics_of, run_here, start

TOOL = (
    "environment.name=skyrl_async.environments.slow_tool:SlowTool",
    "environment.options.latency_s=fixed:0.02",
    "environment.options.turns=fixed:2",
)
QUIET = ("logging.tensorboard=false", "evaluation.num_tasks=0")
TIMES = (
    "simulate.decode_step_s=0.004",
    "simulate.decode_step_s_per_sequence=1e-4",
    "simulate.reply_tokens=uniform:2,10",
    "simulate.step_s=0.03",
    "simulate.step_s_per_token=2e-5",
    "simulate.load_s=0.01",
    "simulate.swap_stall_s=0.004",
    "engine.context_length=256",
    "sampling.max_tokens=16",
)
BOTH = ("simulate.engine=true", "simulate.learner=true", *TIMES, *TOOL, *QUIET)


def test_a_simulated_run_takes_its_times_and_can_be_measured(tmp_path: Path):
    folder = tmp_path / "run"
    summary = run_here(
        folder, *BOTH, "run.steps=30", "staleness.max=2", "checkpoint.every_steps=20"
    )
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)
    assert summary["simulated"] == ["engines", "learner"]
    rows = metrics_of(folder)
    assert len(rows) == 30
    assert 0 < summary["staleness_observed_max"] <= 2
    assert (folder / "checkpoints").exists() and not (folder / "policy").exists()
    # Two turns of 6 tokens on average, and none is lost: 16 trajectories a step.
    assert summary["trajectories_trained"] == 16 * 30
    assert 0.8 * 12 < summary["tokens_trained"] / (16 * 30) < 1.1 * 12

    measured = calibrate(folder)
    costs = measured.scenario.costs
    assert costs.engine.decode_step_s == pytest.approx(0.004, abs=0.0008)
    assert costs.engine.swap_stall_s == pytest.approx(0.004, rel=0.02)
    step_s = costs.learner.seconds(rows[-1]["learner/batch_tokens"])
    assert step_s == pytest.approx(0.03 + 2e-5 * rows[-1]["learner/batch_tokens"], rel=0.1)
    assert 0.01 <= costs.publish_s < 0.05
    assert {len(e.reply_tokens) for e in measured.episodes} == {2}
    waits = [wait for e in measured.episodes for wait in e.waits_s]
    assert sorted(waits)[len(waits) // 2] == pytest.approx(0.02, abs=0.01)
    assert measured.scenario.max_staleness == 2


def test_a_real_engine_plays_for_a_simulated_learner(tmp_path: Path):
    summary = run_here(tmp_path / "run", "simulate.learner=true", *TIMES, *TOOL, "run.steps=4")
    assert (summary["status"], summary["steps"]) == ("finished", 4)
    assert summary["eval_reward_final"] is not None


def test_a_real_learner_trains_on_a_simulated_engine(tmp_path: Path):
    folder = tmp_path / "run"
    summary = run_here(folder, "simulate.engine=true", *TIMES, *TOOL, *QUIET, "run.steps=4")
    assert (summary["status"], summary["steps"]) == ("finished", 4)
    assert metrics_of(folder)[-1]["policy/grad_norm"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_several_simulated_engines_under_ray(tmp_path: Path):
    folder = tmp_path / "run"
    overrides = (*BOTH, "runtime=ray", "rollout.num_actors=2", "run.steps=6")
    summary = finish(start(folder, *overrides), folder, timeout_s=90)
    assert (summary["status"], summary["steps"], summary["exit_code"]) == ("finished", 6, 0)
    assert len(summary["workers"]) == 3
