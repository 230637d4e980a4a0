"""The optimizer's keys: what they become, and what is refused."""

import pytest

from skyrl_async.config import Config
from skyrl_async.config_loading import ConfigError, load_config
from skyrl_async.learner.optimizer import OptimizerSettings, ParameterGroup, rate_at
from skyrl_async.preflight import find_problems
from skyrl_async.runtime.settings import optimizer_settings


def settings_of(config: Config) -> OptimizerSettings:
    return optimizer_settings(config.optimizer, total_steps=config.optimizer_steps)


def test_the_defaults_are_those_of_the_optimizer():
    config = Config()
    assert settings_of(config) == OptimizerSettings(total_steps=config.optimizer_steps)


def test_every_key_arrives():
    config = load_config(
        None,
        [
            *("run.steps=10", "learner.num_minibatches=3", "learner.num_epochs=2"),
            *("optimizer.learning_rate=0.5", "optimizer.warmup_steps=7", "optimizer.beta1=0.1"),
            *("optimizer.beta2=0.2", "optimizer.eps=0.3", "optimizer.weight_decay=0.4"),
            *("optimizer.max_grad_norm=0.6", "optimizer.schedule=cosine"),
            *("optimizer.min_rate_fraction=0.25", "optimizer.no_decay_on_vectors=false"),
            "optimizer.groups="
            "{'layers\\.0\\.': {learning_rate_factor: 0}, norm: {weight_decay: 1}}",
        ],
    )
    assert settings_of(config) == OptimizerSettings(
        learning_rate=0.5,
        betas=(0.1, 0.2),
        eps=0.3,
        weight_decay=0.4,
        max_grad_norm=0.6,
        warmup_steps=7,
        schedule="cosine",
        total_steps=60,
        min_rate_fraction=0.25,
        no_decay_on_vectors=False,
        groups=(
            ParameterGroup(match=r"layers\.0\.", learning_rate_factor=0),
            ParameterGroup(match="norm", weight_decay=1),
        ),
    )


def test_a_schedule_ends_with_the_last_step_of_the_run():
    config = load_config(None, ["run.steps=5", "optimizer.schedule=linear"])
    assert config.optimizer_steps == 10
    settings = settings_of(config)
    assert [rate_at(s, settings) for s in (0, 5, 9, 10)] == pytest.approx([1, 0.5, 0.1, 0])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.min_rate_fraction=0.1"], "optimizer.schedule=constant"),
        (["optimizer.groups={'(': {weight_decay: 0}}"], "no regular expression"),
        (["optimizer.groups={head: {weight_decay: -1}}"], "weight_decay must be a number >= 0"),
        (["optimizer.groups={head: {rate: 1}}"], "unknown key 'rate'"),
        (["optimizer.groups={head: {}}"], "must be a mapping with learning_rate_factor"),
        (["optimizer.groups={head: 3}"], "must be a mapping with learning_rate_factor"),
        (["optimizer.groups={head: {learning_rate_factor: true}}"], "must be a number >= 0"),
    ],
)
def test_what_cannot_work_is_refused(overrides, says):
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    (problem,) = refused.value.problems
    assert problem.startswith("optimizer.") and says in problem
    assert "(command line)" in problem or "from command line" in problem


def test_a_group_that_matches_no_parameter_is_found_before_the_run():
    config = load_config(None, ["optimizer.groups={lm_heat: {weight_decay: 0}}"])
    (problem,) = find_problems(config)
    assert (
        problem.startswith("optimizer.groups: match='lm_heat'") and "correct or remove" in problem
    )
    assert not find_problems(load_config(None, ["optimizer.groups={lm_head: {weight_decay: 0}}"]))


def test_a_warm_up_without_end_is_found_before_the_run():
    overrides = ["run.steps=5", "optimizer.schedule=cosine", "optimizer.warmup_steps=10"]
    (problem,) = find_problems(load_config(None, overrides))
    assert problem.startswith("optimizer.schedule=cosine, optimizer.warmup_steps=10: of 10")
    overrides[-1] = "optimizer.warmup_steps=9"
    assert not find_problems(load_config(None, overrides))
