import pytest

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.config_yaml import parse
from tests.config_cases import only_problem, problems_of, write


def test_bases_come_first_and_in_their_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "one.yaml", "seed: 1\nrun: {name: one, steps: 1}\nengine:\n")
    write(tmp_path, "two.yaml", "seed: 2\nrun: {steps: 2}\nenvironment: {options: {a: 1}}\n")
    file = write(
        tmp_path / "sub",
        "top.yaml",
        "base: [../one.yaml, ../two.yaml]\nrun: {max_seconds: 3}\nenvironment: {options: {b: 2}}\n",
    )
    config = load_config(file, ["run.steps=7"])
    assert (config.seed, config.run.name, config.run.steps) == (2, "one", 7)
    assert config.run.max_seconds == 3
    assert config.environment.options == {"b": 2}


def test_one_base_may_be_reached_twice(tmp_path):
    write(tmp_path, "root.yaml", "seed: 5\n")
    write(tmp_path, "left.yaml", "base: root.yaml\n")
    write(tmp_path, "right.yaml", "base: root.yaml\n")
    assert load_config(write(tmp_path, "top.yaml", "base: [left.yaml, right.yaml]\n"), []).seed == 5


def test_a_cycle_of_bases_is_refused(tmp_path):
    file = write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml is a cycle" in only_problem(file=file)
    own = write(tmp_path, "own.yaml", "base: own.yaml\n")
    assert f"({own}:1): own.yaml -> own.yaml is a cycle" in only_problem(file=own)


def test_a_base_of_the_wrong_type_or_missing_is_refused(tmp_path):
    assert "must be a path or a list" in only_problem(file=write(tmp_path, "a.yaml", "base: 3\n"))
    file = write(tmp_path, "b.yaml", "seed: 1\nbase: [common.yaml]\n")
    write(tmp_path, "commons.yaml", "")
    problem = only_problem(file=file)
    assert f"{tmp_path / 'common.yaml'} ({file}:2): no such file; did you mean" in problem
    assert "commons.yaml" in problem


def test_duplicate_keys_are_refused_at_every_depth(tmp_path):
    file = write(
        tmp_path,
        "a.yaml",
        "seed: 1\nrun:\n  steps: 1\n  steps: 2\nseed: 2\n"
        "environment:\n  options: {tools: [{x: 1, x: 2}]}\n",
    )
    assert problems_of(file=file) == (
        f"{file}:4: run.steps is given twice, first in line 3; remove one",
        f"{file}:5: seed is given twice, first in line 1; remove one",
        f"{file}:7: environment.options.tools.0.x is given twice, first in line 7; remove one",
    )


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("seed: [1\n", 2, "broken YAML"),
        ("seed: 1\nrun:\n\tsteps: 2\n", 3, "indent with spaces, not tabs"),
        ("seed: 1\n---\nseed: 2\n", 2, "expected a single document"),
        ("seed: !!python/object/apply:os.getpid []\n", 1, "could not determine a constructor"),
        ("seed: &a [*a]\n", 1, "a value contains itself"),
        ("seed: *nowhere\n", 1, "undefined alias"),
        ("? [1]\n: 2\n", 1, "a key must be a single word"),
        ("seed: 1\n  run: 2\n", 2, "broken YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(tmp_path, text, line, what):
    file = write(tmp_path, "a.yaml", text)
    problem = only_problem(file=file)
    assert problem.startswith(f"{file}:{line}: ")
    assert what in problem


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- 1\n", "must hold a mapping"),
        ("just text\n", "must hold a mapping"),
        ("a: " + "[" * 800, "nested too deeply"),
        ("seed: " + "1" * 5000, "integer string conversion"),
        ("staleness.max: 3\n", "keys of a file are nested; write {staleness: {max: ...}}"),
        ("a: \x07\n", "unacceptable character"),
        ("<<: {seed: 1}\n", "unknown key"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, text, what):
    assert what in only_problem(file=write(tmp_path, "a.yaml", text))


def test_unreadable_files_are_refused(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in only_problem(file=binary)
    assert "is a folder" in only_problem(file=tmp_path)
    assert "no folder" in only_problem(file=tmp_path / "nowhere" / "a.yaml")
    assert "YAML files there: binary.yaml" in only_problem(file=tmp_path / "quite_other.yaml")
    assert "cannot be read" in only_problem(file=tmp_path / ("x" * 300))
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert "cannot be read" in only_problem(file=loop)


def test_empty_files_and_sections_mean_defaults(tmp_path):
    assert load_config(write(tmp_path, "a.yaml", ""), []) == Config()
    assert load_config(write(tmp_path, "b.yaml", "# only\nrun:\n  # steps: 1\n"), []) == Config()


def test_aliases_do_not_share_what_an_override_changes(tmp_path):
    file = write(
        tmp_path,
        "a.yaml",
        "environment:\n  options: {first: &limits {low: 1}, second: *limits}\n",
    )
    config = load_config(file, ["environment.options.first.low=5"])
    assert config.environment.options == {"first": {"low": 5}, "second": {"low": 1}}


def test_text_that_looks_like_something_else_stays_text():
    assert parse("[010, on, yes, 2024-01-01, '1', 1:30, 0x10]").data == [
        "010", "on", "yes", "2024-01-01", "1", "1:30", "0x10",
    ]  # fmt: skip
