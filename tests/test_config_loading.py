import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.config import Config
from skyrl_async.config_keys import FREE_KEYS, KEYS, SECTIONS, suggest
from skyrl_async.config_loading import ConfigError, dump_config, load_config
from tests.config_cases import only_problem, problems_of, write

LETTERS = string.ascii_lowercase + "_"


def one_character_typos(key: str, rng: random.Random) -> dict[str, str]:
    """Return one deletion, swap, insertion and replacement of a random character."""
    i, letter = rng.randrange(len(key) - 1), rng.choice(LETTERS)
    return {
        "delete": key[:i] + key[i + 1 :],
        "swap": key[:i] + key[i + 1] + key[i] + key[i + 2 :],
        "insert": key[:i] + letter + key[i:],
        "replace": key[:i] + letter + key[i + 1 :],
    }


def all_typos() -> list[tuple[str, str]]:
    rng = random.Random(7)
    pairs = {
        (typo, key)
        for key in KEYS
        for typo in rng.sample(sorted(one_character_typos(key, rng).values()), 2)
        if typo not in KEYS and typo not in SECTIONS
        if not any(typo.startswith(f"{key}.") for key in FREE_KEYS)
    }
    return sorted(pairs)


def test_every_typo_of_a_key_is_refused_and_the_right_key_suggested():
    typos = all_typos()
    assert len(typos) >= 100
    problems = problems_of(*(f"{typo}=1" for typo, _ in typos))
    for (typo, key), problem in zip(typos, problems, strict=True):
        assert problem.startswith(f"{typo}=1 (command line): "), problem
        assert key in problem.partition("did you mean ")[2], (typo, key, problem)


def test_typos_in_a_file_are_suggested_with_their_lines(tmp_path):
    file = write(tmp_path, "a.yaml", "seed: 1\nstaleness:\n  rule: mask\n  mx: 3\nlerner: {}\n")
    problems = problems_of(file=file)
    assert problems == (
        f"staleness.mx=3 ({file}:4): unknown key; did you mean staleness.max?",
        f"lerner={{}} ({file}:5): unknown section; did you mean learner?",
    )


@pytest.mark.parametrize(
    ("given_key", "meant"),
    [
        ("stalness.max", ["staleness.max"]),
        ("max", ["staleness.max"]),
        ("learning_rate", ["critic.learning_rate", "optimizer.learning_rate"]),
        ("trainer.groups_per_step", ["learner.groups_per_step"]),
        ("engine.group_size", ["rollout.group_size"]),
        ("timeout_s", ["checkpoint.timeout_s", "weight_sync.timeout_s", "evaluation.timeout_s"]),
        ("staleness_max", ["staleness.max"]),
        ("zzzzzz", []),
    ],
)
def test_suggestions_look_in_all_sections(given_key, meant):
    assert suggest(given_key) == meant


def test_without_a_near_key_the_section_is_listed():
    assert "staleness has max, rule" in only_problem("staleness.zzzzzz=1")
    assert "at the top are seed, runtime" in only_problem("zzzzzz=1")


def test_no_file_and_no_override_gives_the_defaults():
    assert load_config(None, []) == Config()


def test_overrides_are_accepted_in_three_forms_and_later_ones_win():
    config = load_config(
        None,
        [
            "seed=1",
            "--staleness.max",
            "0",
            "--learner.groups_per_step=4",
            "seed=3",
            "runtime=local",
        ],
    )
    assert (config.seed, config.staleness.max) == (3, 0)
    assert (config.learner.groups_per_step, config.runtime) == (4, "local")


def test_a_negative_value_is_a_value_not_an_option():
    assert load_config(None, ["--run.stop_at_eval_reward", "-1"]).run.stop_at_eval_reward == -1


def test_override_of_a_section_merges_and_of_options_replaces():
    config = load_config(
        None,
        [
            "staleness={rule: drop}",
            "environment.options={low: 1, high: 3}",
            "environment.options={high: 4}",
            "environment.options.tools.calculator=true",
        ],
    )
    assert (config.staleness.max, config.staleness.rule) == (2, "drop")
    assert config.environment.options == {"high": 4, "tools": {"calculator": True}}


@pytest.mark.parametrize("text", ["2e-3", "0.002", ".2e-2", "2E-3", "+2e-3"])
def test_every_way_to_write_a_small_number_is_a_number(tmp_path, text):
    file = write(tmp_path, "a.yaml", f"optimizer:\n  learning_rate: {text}\n")
    assert load_config(file, []).optimizer.learning_rate == 0.002
    assert load_config(None, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 0.002


def test_an_integer_is_accepted_for_a_number():
    assert load_config(None, ["cluster.startup_timeout_s=5"]).cluster.startup_timeout_s == 5.0


def test_names_on_the_command_line_need_no_quotes():
    config = load_config(None, ["run.name=2024", "run.dir=/tmp/a: b", "environment.name=m:Class"])
    assert (config.run.name, config.run.dir) == ("2024", "/tmp/a: b")
    assert config.environment.name == "m:Class"
    assert load_config(None, ["run.dir=null"]).run.dir is None


@pytest.mark.parametrize(
    ("override", "must"),
    [
        ("seed=abc", "must be an integer >= 0"),
        ("seed=true", "must be an integer >= 0"),
        ("seed=1.5", "must be an integer >= 0"),
        ("seed=1.0", "must be an integer >= 0"),
        ("seed=010", "must be an integer >= 0"),
        ("seed='1'", "must be an integer >= 0"),
        ("seed=2147483648", "< 2147483648"),
        ("run.steps=null", "must be an integer >= 1; the default is 240"),
        ("run.steps=[1]", "must be an integer >= 1"),
        ("learner.groups_per_step=-4", "must be an integer >= 1; the default is 16"),
        ("engine.max_concurrent=0", "must be an integer >= 1; the default is 256"),
        ("replay.capacity_bytes=-1", "must be an integer >= 1"),
        ("optimizer.learning_rate=fast", "must be a finite number > 0; the default is 0.002"),
        ("optimizer.learning_rate=.nan", "must be a finite number > 0"),
        ("optimizer.eps=.inf", "must be a finite number > 0"),
        ("optimizer.eps=true", "must be a finite number > 0"),
        ("run.stop_at_eval_reward=.inf", "must be a finite number or null"),
        ("kl.coefficient=.inf", "must be a number >= 0 and <= 1e+06; the default is 0"),
        ("optimizer.beta1=1", "must be a number >= 0 and < 1; the default is 0.9"),
        ("logging.tensorboard=yes", "must be true or false; the default is true"),
        ("logging.tensorboard=1", "must be true or false"),
        ("runtime=rya", "must be one of ray, local; did you mean ray?"),
        ("runtime=LOCAL", "must be one of ray, local; did you mean local?"),
        ("staleness.rule=maks", "must be one of mask, drop, pace; did you mean mask?"),
        ("run.name=a b", "of the form"),
        ("environment.options=3", "must be a mapping"),
        ("environment.options={1: 2}", "key 1 (command line): must be text; put it in quotes"),
        ("staleness=3", "staleness is a section; set its keys, for example staleness.max=2"),
        ("staleness.max.x=3", "staleness.max is a value, not a section"),
        ("base=a.yaml", "use --config a.yaml"),
        ("foo", "not of the form key=value"),
        ("a.yaml", "write --config a.yaml"),
        ("=3", "not of the form key=value"),
        ("--seed", "has no value; write --seed=VALUE"),
        ("seed=[", "broken YAML"),
        ("staleness={max: 1, max: 2}", "staleness={max: 1, max: 2}".partition("=")[0]),
    ],
)
def test_bad_overrides_are_refused_with_limit_and_remedy(override, must):
    problem = only_problem(override)
    assert must in problem
    assert "command line" in problem


def test_a_number_for_a_name_in_a_file_asks_for_quotes(tmp_path):
    file = write(tmp_path, "a.yaml", "run:\n  name: 2024\n")
    assert f"run.name=2024 ({file}:2)" in only_problem(file=file)
    assert "put it in quotes" in only_problem(file=file)


def test_all_errors_come_at_once_from_files_overrides_and_across_sections(tmp_path):
    file = write(
        tmp_path,
        "a.yaml",
        "seed: abc\nlearner:\n  groups_per_step: 16\n  foo: 1\nsampling:\n  top_k: 5\n",
    )
    problems = problems_of("stalness.max=1", "runtime=rya", "replay.capacity_groups=3", file=file)
    assert len(problems) == 6
    text = "\n".join(problems)
    for part in (
        f"learner.foo=1 ({file}:4): unknown key",
        "stalness.max=1 (command line): unknown key; did you mean staleness.max?",
        f"seed='abc' ({file}:1): must be an integer",
        "runtime='rya' (command line)",
        f"(sampling.top_k from {file}:6)",
        f"replay.capacity_groups from command line, learner.groups_per_step from {file}:3",
    ):
        assert part in text, part


def test_no_error_across_sections_is_invented_for_a_value_that_is_wrong_itself():
    assert "capacity_groups" in only_problem("replay.capacity_groups=many", "sampling.top_p=1")
    # Valid with the 4 that was meant, so only the typo counts.
    problem = only_problem("learner.groups_per_stepp=4", "replay.capacity_groups=8")
    assert "did you mean learner.groups_per_step?" in problem


def test_a_broken_file_does_not_hide_bad_overrides(tmp_path):
    problems = problems_of("sede=1", file=write(tmp_path, "a.yaml", "seed: [\n"))
    assert len(problems) == 2
    assert "did you mean seed?" in problems[1]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["1e3", "010", "on", "null", "~", "2e-3", "1_0", ".5", "<<", "=", "- a", "?"])
)


OPTIONS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1),
    options=OPTIONS,
    directory=st.none() | st.text(max_size=20),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    staleness=st.integers(0, 10**6),
    rule=st.sampled_from(["mask", "drop", "pace"]),
    tensorboard=st.booleans(),
)
def test_what_is_dumped_loads_back_equal(
    tmp_path_factory, seed, options, directory, rate, staleness, rule, tensorboard
):
    config = Config.model_validate(
        {
            "seed": seed,
            "run": {"dir": directory},
            "environment": {"options": options},
            "optimizer": {"learning_rate": rate},
            "staleness": {"max": staleness, "rule": rule},
            "logging": {"tensorboard": tensorboard},
        }
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file, []) == config


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=12) | st.sampled_from(sorted(KEYS)), max_size=4))
def test_any_command_line_is_accepted_or_refused_as_configuration_error(overrides):
    try:
        config = load_config(None, overrides)
    except ConfigError as error:
        assert error.problems
    else:
        assert isinstance(config, Config)
