"""Distillation as a whole run, from random weights to the reward of the teacher."""

from pathlib import Path

import pytest

from skyrl_async.config_loading import load_config
from skyrl_async.run_folder import RunFolder
from skyrl_async.sft.data import load_demonstration_set
from skyrl_async.sft.run import train
from tests.runtime.launch import metrics_of, run_here
from tests.sft.demonstrations import write_games

SIZES = ("model.hidden_size=64", "model.num_heads=4", "logging.tensorboard=false")


def perfect_teacher(folder: Path) -> Path:
    """Fine-tune a policy on the games of a perfect player; return its folder."""
    games = write_games(folder / "games.jsonl", 300)
    config = load_config(
        None,
        [
            *SIZES,
            *(f"sft.data={games}", f"run.dir={folder / 'teacher'}", "sft.epochs=6"),
            *("optimizer.schedule=cosine", "checkpoint.every_steps=0", "seed=9"),
        ],
    )
    data = load_demonstration_set(config)
    with RunFolder.create(config) as run_folder:
        assert train(config, run_folder, data) == 0
    return folder / "teacher" / "policy"


@pytest.mark.slow
def test_a_student_without_rewards_gets_as_good_as_its_teacher(tmp_path):
    teacher = perfect_teacher(tmp_path)
    folder = tmp_path / "student"
    summary = run_here(
        folder,
        *SIZES,
        *(f"distillation.teacher={teacher}", "sampling.max_tokens=1", "staleness.max=1"),
        *("learner.groups_per_step=8", "rollout.group_size=8", "run.steps=120", "seed=1"),
        *("evaluation.every_steps=20", "evaluation.num_tasks=60", "run.stop_at_eval_reward=0.99"),
    )
    assert summary["status"] == "finished", summary
    rows = metrics_of(folder)
    assert rows[0]["distillation/reverse_kl"] > 2
    assert rows[-1]["distillation/reverse_kl"] < 0.5
    assert sum(row.get("reward/mean", 0.0) for row in rows[:5]) / 5 < 0.3
    assert summary["eval_reward_final"] > 0.95
