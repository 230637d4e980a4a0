"""What a configuration is refused for, and files to load it from."""

from pathlib import Path

import pytest

from skyrl_async.config_loading import ConfigError, load_config


def problems_of(*overrides: str, file: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    error = caught.value
    assert all(problem in str(error) for problem in error.problems)
    return error.problems


def only_problem(*overrides: str, file: Path | None = None) -> str:
    problems = problems_of(*overrides, file=file)
    assert len(problems) == 1, problems
    return problems[0]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path
