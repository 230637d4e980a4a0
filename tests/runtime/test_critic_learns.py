"""Whole asynchronous runs with a critic: the policy learns, and the values of its states do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.launch import metrics_of, run_here


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "vtrace"])
def test_policy_and_critic_learn_from_tokens_of_older_policies(tmp_path: Path, algorithm: str):
    """Whoever does not listen to the answers names one of two numbers, again and again."""
    folder = tmp_path / "run"
    summary = run_here(
        folder,
        f"algorithm={algorithm}",
        "run.steps=120",
        "model.hidden_size=32",
        "learner.groups_per_step=8",
        "rollout.group_size=8",
        "environment.name=number_guess",
        "environment.options.high=2",
        "environment.options.max_guesses=4",
        "sampling.max_tokens=2",
        "staleness.max=4",
        "optimizer.schedule=linear",
        "evaluation.every_steps=4",
        "evaluation.num_tasks=20",
        "logging.tensorboard=false",
    )
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)
    rows = metrics_of(folder)
    evaluated = [row["eval/reward_mean"] for row in rows if "eval/reward_mean" in row]
    assert evaluated[0] <= 0.7, "a constant guess"
    assert summary["eval_reward_final"] >= 0.9
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.3

    # Values begin at 0: the error first grows with the spread of the rewards, then it falls.
    losses = [row["loss/value"] for row in rows]
    assert mean(losses[-10:]) < 0.5 * max(mean(losses[n : n + 10]) for n in range(0, 60, 10))
    ages = [int(age) for row in rows for age in row["staleness/histogram"]]
    assert 0 < max(ages) <= 4 == summary["staleness_configured_max"]
    assert mean([row["staleness/mean"] for row in rows]) > 1
