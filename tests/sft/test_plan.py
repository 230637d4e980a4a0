import json
from pathlib import Path

import pytest

from skyrl_async.checkpoint import CONFIG, RUN_STATE, begin, commit
from skyrl_async.config import Config
from skyrl_async.config_loading import dump_config, load_config
from skyrl_async.coordination.run_state import RunState
from skyrl_async.sft.data import DemonstrationSet, load_demonstration_set
from skyrl_async.sft.plan import check_resume, make_plan, num_steps
from tests.sft.demonstrations import write_games


def config_of(games: Path, *overrides: str) -> Config:
    return load_config(None, [f"sft.data={games}", "sft.eval_fraction=0.2", *overrides])


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    return write_games(tmp_path_factory.mktemp("games") / "games.jsonl", 40)


@pytest.fixture(scope="module")
def data(games) -> DemonstrationSet:
    return load_demonstration_set(config_of(games))


def checkpoint(root: Path, state: RunState, config: Config) -> Path:
    partial = begin(root, state.step)
    (partial / CONFIG).write_text(dump_config(config))
    (partial / RUN_STATE).write_text(json.dumps(state.to_json()))
    return commit(partial, step=state.step, policy_version=state.policy_version, num_ranks=1)


def test_steps_are_epochs_times_batches(games, data):
    assert len(data.training) == 32
    assert num_steps(config_of(games, "sft.epochs=3", "sft.examples_per_step=10"), data) == 12
    assert num_steps(config_of(games, "sft.epochs=1", "sft.examples_per_step=100"), data) == 1


def test_a_schedule_must_fit_them(games, data):
    overrides = ("sft.epochs=1", "sft.examples_per_step=8", "optimizer.schedule=cosine")
    assert num_steps(config_of(games, *overrides, "optimizer.warmup_steps=3"), data) == 4
    with pytest.raises(ValueError, match="of 4 optimizer steps in all none is left"):
        num_steps(config_of(games, *overrides, "optimizer.warmup_steps=4"), data)


def test_the_learner_gets_one_optimizer_step_each_and_no_reinforcement_learning(
    games, data, tmp_path
):
    given = config_of(
        games,
        *("kl.coefficient=0.1", "critic.kind=head", "algorithm.advantage=gae", "sft.epochs=2"),
        *("distillation.teacher=some/model", "distillation.reward_weight=1"),
    )
    plan = make_plan(given, data, folder=tmp_path, resume=None)
    assert plan.config.optimizer_steps == plan.steps == 2
    assert plan.config.kl.coefficient == 0 and plan.config.critic.kind == "none"
    assert plan.config.distillation.teacher is None
    assert plan.given is given and plan.first_step == 0


def test_only_checkpoints_of_the_same_demonstrations_can_be_gone_on_with(games, data, tmp_path):
    for name, tasks, says in (
        ("other", {"demonstrations_sha256": "0" * 64}, "trained on other demonstrations"),
        ("rl", {"index": 3}, "is a checkpoint of reinforcement learning"),
        ("same", {"demonstrations_sha256": data.sha256}, None),
    ):
        state = RunState(step=7, policy_version=7, tasks=tasks)
        folder = checkpoint(tmp_path / name, state, config_of(games))
        config = config_of(games, f"run.resume={folder}")
        if says is None:
            check_resume(config, data)
            continue
        with pytest.raises(ValueError, match=says):
            check_resume(config, data)
    check_resume(config_of(games), data)
