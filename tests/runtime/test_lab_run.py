"""Whole runs with an exact lag: the ordinary staleness metrics show it, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runtime.launch import finish, metrics_of, run_here, start

QUIET = ("logging.tensorboard=false", "checkpoint.every_steps=0")


def assert_exact(rows: list[dict[str, Any]], lag: int) -> None:
    """The mean of integers is their maximum only if all of them are it."""
    assert len(rows) > lag
    for row in rows:
        expected = min(row["step"] - 1, lag)
        assert row["staleness/mean"] == row["staleness/max"] == expected
        assert row["staleness/masked_fraction"] == 0


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_every_trained_token_is_exactly_so_old(lag: int, tmp_path: Path):
    folder = tmp_path / "run"
    overrides = (f"lab.exact_lag={lag}", f"staleness.max={lag}", "run.steps=9", *QUIET)
    summary = run_here(folder, *overrides)
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)
    assert_exact(metrics_of(folder), lag)
    assert summary["lab"] == {"exact_lag": lag, "warmup_steps": lag}
    # The evaluation at the end is of the last policy, not of the one that engines had.
    assert summary["eval_policy_version"] == 9


def test_adapters_are_held_back_as_well(tmp_path: Path):
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    lora = ("lora.rank=2", "lora.publish=adapter")
    run_here(folder, "lab.exact_lag=3", "staleness.max=3", "run.steps=6", *lora, *QUIET)
    assert_exact(metrics_of(folder), 3)


def test_noise_on_the_logprobs_is_seen_as_mismatch_and_not_as_lag(tmp_path: Path):
    std = 0.5
    keys = ("lab.exact_lag=0", "staleness.max=0", "run.steps=4", *QUIET)
    summary = run_here(tmp_path / "noisy", *keys, f"lab.logprob_noise={std}")
    assert summary["status"] == "finished"
    noisy, plain = metrics_of(tmp_path / "noisy"), []
    run_here(tmp_path / "plain", *keys)
    plain = metrics_of(tmp_path / "plain")
    for row, exact in zip(noisy, plain, strict=True):
        assert exact["offpolicy/ess_fraction"] == pytest.approx(1, abs=1e-3)
        assert row["offpolicy/ess_fraction"] < 0.95
        assert row["staleness/max"] == 0


@pytest.mark.slow
def test_stragglers_make_a_normal_run_staler(tmp_path: Path):
    keys = ("run.steps=6", "staleness.max=4", *QUIET)
    slowed = ("lab.straggler_fraction=0.3", "lab.straggler_factor=20")
    run_here(tmp_path / "plain", *keys)
    run_here(tmp_path / "slowed", *keys, *slowed)
    seconds = {name: metrics_of(tmp_path / name)[-1]["time_s"] for name in ("plain", "slowed")}
    assert seconds["slowed"] > 1.2 * seconds["plain"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_actors_on_ray_have_the_same_exact_lag(tmp_path: Path):
    folder = tmp_path / "run"
    process = start(
        folder,
        *("runtime=ray", "rollout.num_actors=2", "lab.exact_lag=3", "staleness.max=3"),
        *("run.steps=8", *QUIET),
    )
    summary = finish(process, folder, timeout_s=200)
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)
    assert_exact(metrics_of(folder), 3)
    assert summary["eval_policy_version"] == 8
