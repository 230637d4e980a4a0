"""The keys of distillation: what they become, and what is refused before a run."""

import pytest

from skyrl_async.algorithms.distillation import DistillationSettings
from skyrl_async.config_loading import ConfigError, load_config
from skyrl_async.learner.policy import save_policy
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.preflight import find_problems
from skyrl_async.runtime.settings import distillation_settings, teacher_source


def test_without_a_teacher_there_is_none():
    config = load_config(None, [])
    assert distillation_settings(config) is None
    with pytest.raises(ValueError, match="not set"):
        teacher_source(config)


def test_every_key_arrives():
    config = load_config(
        None,
        [
            *("distillation.teacher=some/model", "distillation.coefficient=0.5"),
            *("distillation.reward_weight=0.25", "distillation.max_log_ratio=null"),
        ],
    )
    assert distillation_settings(config) == DistillationSettings(
        coefficient=0.5, reward_weight=0.25, max_log_ratio=None
    )
    assert teacher_source(config).path == "some/model"
    alone = load_config(None, ["distillation.teacher=some/model"])
    assert distillation_settings(alone) == DistillationSettings()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distillation.coefficient=2"], "there is no teacher; set distillation.teacher"),
        (["distillation.max_log_ratio=null"], "distillation.max_log_ratio=null: there is no"),
        (["distillation.teacher=a", "algorithm.proximal=interpolated"], "recomputed"),
        (["distillation.teacher=a", "correction.opsm_delta=0.1"], "remove correction.opsm_delta"),
        (["distillation.teacher=a", "correction.m2_limit=0.1"], "remove correction.m2_limit"),
        (["distillation.teacher=a", "algorithm.loss=m2po"], "set another loss, such as"),
        (
            ["distillation.teacher=a", "algorithm.advantage=gae", "critic.kind=head"],
            "critic.kind=head, distillation.reward_weight=0",
        ),
        (["distillation.teacher=a", "filters.zero_variance=true"], "filters.zero_variance=true"),
        (["distillation.teacher=a", "filters.max_pass_rate=0.9"], "filters.max_pass_rate=0.9"),
        (
            ["distillation.teacher=a", "kl.coefficient=0.1", "kl.placement=reward"],
            "set kl.placement=loss or distillation.reward_weight above 0",
        ),
        (
            ["distillation.teacher=a", "algorithm.overlong_buffer_tokens=8"],
            "algorithm.overlong_buffer_tokens=8, distillation.reward_weight=0",
        ),
        (
            ["distillation.teacher=a", "algorithm.whiten_advantages=true"],
            "algorithm.whiten_advantages=true, distillation.reward_weight=0",
        ),
        (
            ["distillation.teacher=a", "algorithm.advantage=optimal_off_policy_baseline"],
            "set algorithm.advantage=mean_centered or distillation.reward_weight above 0",
        ),
        (["distillation.coefficient=1e300"], "must be a number > 0 and <= 1e+06"),
        (["distillation.max_log_ratio=1e300"], "must be a number > 0 and <= 1e+30 or null"),
    ],
)
def test_what_cannot_work_is_refused(overrides, says):
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    (problem,) = refused.value.problems
    assert says in problem


def test_with_rewards_filters_and_critics_are_allowed():
    load_config(
        None,
        [
            *("distillation.teacher=a", "distillation.reward_weight=1"),
            *("algorithm.advantage=gae", "critic.kind=head", "filters.zero_variance=true"),
            *("kl.coefficient=0.1", "kl.placement=reward", "algorithm.whiten_advantages=true"),
            "algorithm.overlong_buffer_tokens=8",
        ],
    )


def test_a_divergence_in_the_loss_is_allowed_without_rewards():
    load_config(None, ["distillation.teacher=a", "kl.coefficient=0.1"])


def test_a_teacher_is_looked_at_before_a_run(tmp_path):
    def problems(folder, *overrides: str) -> list[str]:
        return find_problems(load_config(None, [f"distillation.teacher={folder}", *overrides]))

    (problem,) = problems(tmp_path / "missing")
    assert problem.startswith("distillation.teacher=") and "no such folder" in problem
    model = build_tiny_model(hidden_size=16, num_heads=2, max_position_embeddings=128)
    save_policy(model, build_tiny_tokenizer(), tmp_path / "good")
    assert problems(tmp_path / "good") == []
    (problem,) = problems(tmp_path / "good", "engine.context_length=129")
    assert "128 positions, fewer than engine.context_length=129" in problem
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["perhaps"])
    save_policy(model, tokenizer, tmp_path / "other")
    (problem,) = problems(tmp_path / "other")
    assert "its tokenizer is not the policy's" in problem
