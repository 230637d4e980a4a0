"""Values that would do nothing, or not what they say: refused before a run, with the remedy."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from skyrl_async.config_loading import load_config
from skyrl_async.metrics.console import ConsoleSink
from skyrl_async.run_folder import RunFolder
from tests.config_cases import only_problem, problems_of

NONE = "correction.weight=none"
UNCORRECTED = "without any off-policy correction"
CRITIC = ("algorithm.advantage=gae", "critic.kind=head")
RETRACE = ("algorithm.advantage=retrace", "critic.kind=head")
VTRACE = ("algorithm.advantage=vtrace", "critic.kind=head")
ADAPTIVE = ("algorithm.advantage=length_adaptive_gae", "critic.kind=head")
PENALIZED = ("kl.coefficient=0.1", "kl.placement=reward")
NO_LIMITS = "correction.k2_limit=null, correction.k3_limit=null: it is the level of these limits"


@pytest.mark.parametrize(
    ("override", "must"),
    [
        *((f"correction.{of}_low=0", "> 0 and <= 1") for of in ("token", "sequence", "geometric")),
        *(
            (f"correction.{of}_high=1e9", "a number >= 1 and <= 10000 or null")
            for of in ("token", "sequence", "geometric")
        ),
        *(
            (f"correction.{of}_limit=1e30", "a number > 0 and <= 100 or null")
            for of in ("k2", "k3", "m2")
        ),
        ("correction.opsm_delta=1e30", "a number >= 0 and <= 100 or null"),
    ],
)
def test_a_limit_that_rejects_nothing_is_refused(override, must):
    problem = only_problem(override)
    assert must in problem
    assert "would reject nothing; the default is null" in problem


@pytest.mark.parametrize("source", [NONE, "algorithm.loss=ppo_behavior"])
@pytest.mark.parametrize(
    "mask",
    [
        *("correction.token_low=0", "correction.sequence_low=0", "correction.geometric_low=0"),
        *("correction.token_high=1e9", "correction.k2_limit=1e30", "correction.k3_limit=1e30"),
        *("correction.opsm_delta=1e30", "correction.m2_limit=1e30"),
    ],
)
def test_a_mask_that_rejects_nothing_is_no_correction(source, mask):
    problems = problems_of(source, mask, "staleness.max=2")
    assert len(problems) == 2
    assert "would reject nothing" in problems[0] and UNCORRECTED in problems[1]


@pytest.mark.parametrize("source", [NONE, "algorithm.loss=ppo_behavior"])
@pytest.mark.parametrize(
    "mask",
    [
        *("correction.token_low=0.5", "correction.sequence_low=0.5", "correction.geometric_low=1"),
        *("correction.veto_below=1e-4", "correction.opsm_delta=0.5"),
    ],
)
def test_a_mask_that_leaves_the_largest_ratios_is_no_correction_by_itself(source, mask):
    overrides = (source, mask, "staleness.max=2")
    problem = only_problem(*overrides)
    assert UNCORRECTED in problem
    assert mask.partition("=")[0] in problem
    assert "leaves the largest ratios in the loss" in problem
    load_config(None, [*overrides, "correction.token_high=5"])
    load_config(None, [*overrides, "algorithm.allow_uncorrected=true"])
    load_config(None, [mask, "staleness.max=2"])


@pytest.mark.parametrize(
    "mask",
    [
        *("correction.token_high=5", "correction.sequence_high=10", "correction.geometric_high=1"),
        *("correction.k2_limit=0.1", "correction.k3_limit=0.01", "correction.m2_limit=0.04"),
    ],
)
def test_a_mask_that_bounds_ratios_from_above_is_a_correction(mask):
    load_config(None, [NONE, mask, "staleness.max=2"])
    load_config(None, ["algorithm.loss=ppo_behavior", mask, "staleness.max=2"])


def test_a_filter_for_equal_rewards_needs_two_of_them():
    one = ("rollout.group_size=1", "filters.zero_variance=true")
    problem = only_problem(*one, "algorithm.advantage=global_baseline")
    assert problem.startswith("rollout.group_size=1, filters.zero_variance=true: ")
    assert "16 of 17 groups would be thrown away; set rollout.group_size to 2 or more" in problem
    load_config(None, ["rollout.group_size=2", "filters.zero_variance=true"])


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("correction.weight_cap=1e300", ">= 1 and <= 1e+30"),
        ("algorithm.vtrace_rho_cap=1e300", "> 0 and <= 1e+30"),
        ("algorithm.vtrace_c_cap=1e300", "> 0 and <= 1e+30"),
        ("kl.coefficient=1e300", ">= 0 and <= 1e+06"),
        ("algorithm.entropy_coefficient=1e300", ">= 0 and <= 1e+06"),
        ("algorithm.squared_log_ratio_coefficient=1e300", ">= 0 and <= 1e+06"),
        ("critic.clip=1e300", "> 0 and <= 1e+30"),
        ("critic.learning_rate=1e300", "> 0 and <= 1e+06"),
    ],
)
def test_a_number_that_training_cannot_compute_with_is_refused(override, limit):
    assert f"must be a number {limit}" in only_problem(override, *VTRACE)


@pytest.mark.parametrize(
    ("key", "readers"),
    [
        ("algorithm.gamma=0.9", (CRITIC, RETRACE, VTRACE, ADAPTIVE, PENALIZED)),
        ("algorithm.gae_lambda=0.9", (CRITIC, RETRACE, VTRACE)),
        ("algorithm.length_adaptive_alpha=0.1", (ADAPTIVE,)),
        ("algorithm.vtrace_rho_cap=2", (VTRACE,)),
        ("algorithm.vtrace_c_cap=0.5", (VTRACE,)),
        ("critic.learning_rate=0.1", (CRITIC,)),
        ("critic.updates=2", (CRITIC,)),
        ("critic.clip=null", (CRITIC,)),
        ("critic.bootstrap_truncated=true", (CRITIC,)),
        (
            "correction.k_level=sequence_mean",
            (["correction.k2_limit=1"], ["correction.k3_limit=1"]),
        ),
        ("filters.pass_reward=0.5", (["filters.max_pass_rate=0.9"],)),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_what_would(key, readers):
    problem = only_problem(key)
    name = key.partition("=")[0]
    assert problem.startswith(f"{key}, ")
    assert f"or remove {name.partition('.')[2]} ({name} from command line)" in problem
    for overrides in readers:
        load_config(None, [key, *overrides])


@pytest.mark.parametrize(
    ("key", "others", "says"),
    [
        ("algorithm.gamma=0.9", ("kl.coefficient=0.1",), "kl.placement=loss: nothing would be"),
        ("algorithm.gamma=0.9", ("kl.placement=reward",), "kl.coefficient=0, kl.placement=reward"),
        ("algorithm.gae_lambda=0.9", ADAPTIVE, "set gae, turn_level_gae, vtrace or retrace"),
        ("algorithm.length_adaptive_alpha=0.1", CRITIC, "set length_adaptive_gae, or remove"),
        ("algorithm.vtrace_rho_cap=2", RETRACE, "set vtrace, or remove vtrace_rho_cap"),
        ("algorithm.vtrace_c_cap=2", CRITIC, "set vtrace, or remove vtrace_c_cap"),
        ("correction.normalize=true", ("algorithm.loss=aipo",), "correction.weight=none"),
        ("correction.k_level=sequence_sum", ("correction.token_high=5",), NO_LIMITS),
    ],
)
def test_a_key_that_only_others_read_is_refused(key, others, says):
    problem = only_problem(key, *others)
    assert problem.startswith(f"{key}, ")
    assert says in problem


def test_what_is_switched_on_and_off_may_stay_set():
    load_config(
        None,
        [
            *("guard.patience_steps=9", "guard.max_kl=2", "kl.estimator=k3"),
            *("algorithm.loss=aipo", "correction.weight_cap=3"),
        ],
    )
    load_config(None, ["algorithm.gamma=1.0", "critic.clip=0.2", "correction.k_level=token"])


def test_a_missing_critic_is_named_once():
    assert "set critic.kind=model or head" in only_problem(CRITIC[0], "critic.clip=0.5")


def test_no_key_is_called_unread_because_what_reads_it_is_wrong_itself():
    assert "correction.k2_limit=-1" in only_problem(
        "correction.k_level=sequence_mean", "correction.k2_limit=-1"
    )
    assert "filters.max_pass_rate=2" in only_problem(
        "filters.pass_reward=0.5", "filters.max_pass_rate=2"
    )


def test_a_loss_that_is_not_known_is_told_how_to_bring_its_own():
    own = "A loss of your own is given as module:function"
    assert f"did you mean ppo_clip? {own}" in only_problem("algorithm.loss=ppo_clp")
    assert f"vespo. {own}" in only_problem("algorithm.loss=zzz")


def test_a_length_that_is_not_set_reads_as_on_the_command_line():
    problem = only_problem("algorithm.aggregation=constant")
    assert "algorithm.aggregation_length=null: " in problem


@pytest.mark.parametrize("on", [True, False])
def test_the_console_names_tensorboard_only_where_it_is_on(tmp_path: Path, on: bool):
    config = load_config(
        None, [f"run.dir={tmp_path / 'run'}", f"logging.tensorboard={str(on).lower()}"]
    )
    file = io.StringIO()
    sink = ConsoleSink("plain", run_name="run", console=Console(file=file, width=80))
    with RunFolder.create(config) as folder:
        sink.finish({"status": "finished"}, run_dir=folder.path)
    assert ("TensorBoard" in file.getvalue()) is on
