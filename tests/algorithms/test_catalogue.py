import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import skyrl_async.algorithms.__main__ as catalogue_command
from skyrl_async import config_algorithm
from skyrl_async.algorithms import advantages
from skyrl_async.algorithms.__main__ import as_json, as_markdown, main
from skyrl_async.algorithms.catalogue import entries, losses
from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.algorithms.kl import KlEstimator
from skyrl_async.algorithms.loss_by_name import check_loss, find_loss
from skyrl_async.config_algorithm import (
    ADVANTAGES,
    BEHAVIOR_LOSSES,
    PROXIMAL_LOSSES,
    AlgorithmSection,
    CorrectionSection,
    CriticSection,
    KlSection,
)
from skyrl_async.config_layers import PRESETS
from skyrl_async.config_loading import ConfigError, load_config
from skyrl_async.learner.algorithm_settings import (
    VALUE_ESTIMATORS,
    WEIGHTED_LOSSES,
    AlgorithmSettings,
    KlSettings,
)
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.runtime.settings import algorithm_settings

PRESET_NAMES = sorted(p.stem for p in PRESETS.glob("*.yaml"))


def test_every_entry_has_an_equation_or_a_summary_and_a_source():
    for entry in entries():
        assert entry.summary.endswith("."), entry.name
        assert entry.source, entry.name
        if entry.kind == "loss":
            assert entry.equation, entry.name


def test_every_entry_has_tests_and_a_word_on_when_it_helps():
    for entry in entries():
        files = catalogue_command.test_files(entry)
        tests = "".join((Path(__file__).parent / name).read_text() for name in files)
        assert entry.name in tests, f"{entry.name} is not in {files}"
        assert entry.when, entry.name


def test_the_page_of_algorithms_has_the_present_table():
    page = Path(__file__).parents[2] / "docs" / "algorithms.md"
    assert as_markdown(list(entries())) in page.read_text()


def test_names_are_unique():
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names))


def test_the_configuration_knows_exactly_the_losses_that_there_are_and_their_ratio():
    assert set(losses()) == {*PROXIMAL_LOSSES, *BEHAVIOR_LOSSES}
    for name, function in losses().items():
        ratios = ("proximal", "none") if name in PROXIMAL_LOSSES else ("behavior",)
        doc = function.__doc__ or ""
        assert any(f"Ratio: {ratio}" in doc for ratio in ratios), name


def test_the_learner_knows_exactly_the_losses_whose_ratio_is_to_the_behavior_policy():
    assert {find_loss(name) for name in BEHAVIOR_LOSSES} == WEIGHTED_LOSSES


def test_the_configuration_knows_exactly_the_estimators_that_there_are():
    for name in ADVANTAGES:
        if name in (*VALUE_ESTIMATORS, "optimal_off_policy_baseline"):
            continue
        assert len(advantages.estimate(name, [0.0, 1.0, 1.0, 0.0], [0, 0, 1, 1])) == 4
    assert set(VALUE_ESTIMATORS) < set(ADVANTAGES)


def choices(owner: type, name: str) -> tuple[str, ...]:
    """Return the values that a field of a configuration section or of settings may have."""
    return get_args(get_type_hints(owner)[name])


@pytest.mark.parametrize(
    ("section", "settings", "names"),
    [
        (AlgorithmSection, AlgorithmSettings, ("proximal", "aggregation")),
        (KlSection, KlSettings, ("placement",)),
        (CorrectionSection, CorrectionSettings, ("k_level",)),
    ],
)
def test_the_configuration_has_the_choices_that_the_learner_has(section, settings, names):
    for name in names:
        assert choices(section, name) == choices(settings, name) != (), name


def test_the_configuration_has_all_weights_estimators_with_values_and_critics():
    weights = choices(CorrectionSettings, "weight")
    assert get_args(config_algorithm.WeightKind) == weights
    assert choices(CorrectionSection, "weight") == ("auto", *weights)
    estimators = ("auto", *get_args(KlEstimator))
    assert choices(KlSection, "estimator") == estimators == choices(KlSettings, "estimator")
    assert config_algorithm.VALUE_ESTIMATORS == VALUE_ESTIMATORS
    assert set(choices(CriticSection, "kind")) == {"none", *choices(CriticSettings, "kind")}


def test_the_command_line_prints_every_entry(capsys):
    names = [entry.name for entry in entries()]
    main(["--json"])
    assert [e["name"] for e in json.loads(capsys.readouterr().out)] == names
    main([])
    text = capsys.readouterr().out
    main(["--markdown"])
    table = capsys.readouterr().out
    assert all(f"{name}  (" in text and f"| `{name}` |" in table for name in names)
    assert all(as_json(entry)["defaults"] is not None for entry in entries())


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_is_a_valid_configuration_with_a_loss_that_takes_its_options(name):
    config = load_config(None, [f"algorithm={name}", "staleness.max=8"])
    check_loss(config.algorithm.loss, config.algorithm.loss_options)
    settings = algorithm_settings(config)
    assert settings.loss is find_loss(config.algorithm.loss)
    text = (PRESETS / f"{name}.yaml").read_text()
    assert text.startswith("# ")


def test_a_later_override_wins_over_a_preset():
    config = load_config(None, ["algorithm=dapo", "algorithm.loss_options.clip_high=0.5"])
    assert config.algorithm.loss_options == {"clip_low": 0.2, "clip_high": 0.5}
    assert config.filters.zero_variance


@pytest.mark.parametrize("first", ["ppo_recomputed", "icepop", "vapo", "scale_rl"])
def test_a_preset_replaces_another_and_leaves_what_was_said_besides(first):
    config = load_config(None, [f"algorithm={first}", "staleness.max=2", "algorithm=gspo"])
    assert config == load_config(None, ["algorithm=gspo", "staleness.max=2"])
    kept = load_config(None, ["correction.weight_cap=7", f"algorithm={first}", "algorithm=grpo"])
    assert kept.correction.weight_cap == 7


def test_another_loss_leaves_the_options_of_a_preset_behind_and_ones_own_in_place():
    config = load_config(None, ["algorithm=dapo", "algorithm.loss=gspo"])
    assert config.algorithm.loss_options == {}
    own = "algorithm.loss_options.clip_high=0.5"
    for overrides in (["algorithm=dapo", own, "algorithm.loss=gspo"], ["algorithm=dapo", own]):
        assert load_config(None, overrides).algorithm.loss_options["clip_high"] == 0.5
    same = load_config(None, ["algorithm=dapo", "algorithm.loss=ppo_clip"])
    assert same.algorithm.loss_options == {"clip_low": 0.2, "clip_high": 0.28}


def test_a_file_can_name_a_preset(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: gspo\nstaleness: {max: 4}\n")
    assert load_config(file).algorithm.loss == "gspo"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm=gsspo", "no such preset; did you mean gspo?"),
        ("algorithm.loss=ppo_clp", "did you mean ppo_clip?"),
        ("algorithm.advantage=gae", "set critic.kind=model or head"),
        ("critic.kind=head", "no estimator uses the values"),
        ("rollout.group_size=1", "algorithm.advantage=global_baseline"),
        ("algorithm.aggregation=constant", "set both or neither"),
        ("algorithm.loss=ppo_behavior", "algorithm.allow_uncorrected=true"),
        ("correction.weight=none", "without any off-policy correction"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(override, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        load_config(None, [override, "staleness.max=2"])


@pytest.mark.parametrize("name", ["batch_normalized", "reinforce_plus_plus_baseline", "rloo"])
def test_groups_of_one_are_refused_where_they_would_have_no_advantage(name):
    with pytest.raises(ConfigError, match=r"compares the members of a group"):
        load_config(None, [f"algorithm.advantage={name}", "rollout.group_size=1"])
    load_config(None, ["algorithm.advantage=reinforce_plus_plus", "rollout.group_size=1"])


def test_a_behavior_loss_with_a_weight_would_correct_twice():
    with pytest.raises(ConfigError, match="count twice"):
        load_config(None, ["algorithm.loss=aipo", "correction.weight=token"])
    assert load_config(None, ["algorithm.loss=aipo"]).correction.weight == "auto"


def test_uncorrected_training_needs_consent_only_where_tokens_can_be_stale():
    load_config(None, ["correction.weight=none", "staleness.max=0"])
    load_config(None, ["correction.weight=none", "algorithm.allow_uncorrected=true"])


def test_vtrace_is_a_correction_where_no_other_weight_is():
    vtrace = ["algorithm=vtrace", "staleness.max=4", "algorithm.loss=reinforce"]
    plain = [*vtrace, "algorithm.loss_options={}", "correction.weight=none"]
    assert algorithm_settings(load_config(None, plain)).correction.weight == "none"
    with pytest.raises(ConfigError, match="without any off-policy correction"):
        load_config(None, [*plain, "algorithm.advantage=gae"])
    with pytest.raises(ConfigError, match="without any off-policy correction"):
        load_config(None, [*plain, "algorithm.loss=ppo_behavior"])


@pytest.mark.parametrize("override", ["algorithm.loss=aipo", "correction.weight=none"])
def test_a_rate_that_would_follow_no_weights_is_refused(override):
    with pytest.raises(ConfigError, match=r"the rate would never change; set correction.weight"):
        load_config(None, ["algorithm.scale_rate_by_ess=true", "staleness.max=0", override])


def test_what_a_limit_cuts_off_is_left_out_by_configuration():
    assert not algorithm_settings(load_config(None, [])).mask_truncated
    assert algorithm_settings(load_config(None, ["algorithm.mask_truncated=true"])).mask_truncated


def test_what_a_limit_cuts_off_is_bootstrapped_by_configuration():
    for value in (False, True):
        override = f"critic.bootstrap_truncated={str(value).lower()}"
        settings = algorithm_settings(load_config(None, ["algorithm=vtrace", override]))
        assert settings.bootstraps is value
    assert not algorithm_settings(load_config(None, ["algorithm=vtrace"])).bootstraps
    assert not algorithm_settings(load_config(None, [])).bootstraps


def test_the_estimator_of_the_divergence_is_by_default_the_usual_one_of_its_placement():
    for placement, usual in (("loss", "k3"), ("reward", "k1")):
        kl = ["kl.coefficient=0.1", f"kl.placement={placement}"]
        assert algorithm_settings(load_config(None, kl)).kl.kind == usual
        chosen = algorithm_settings(load_config(None, [*kl, "kl.estimator=unbiased_k3"]))
        assert chosen.kl.kind == "unbiased_k3"


def test_interpolated_proximal_logprobs_come_too_late_for_masks():
    with pytest.raises(ConfigError, match=r"correction.token_high=2.*proximal=recomputed"):
        load_config(None, ["algorithm.proximal=interpolated", "correction.token_high=2"])
    with pytest.raises(ConfigError, match=r"algorithm.loss=m2po.*proximal=recomputed"):
        load_config(None, ["algorithm.proximal=interpolated", "algorithm.loss=m2po"])
