import pickle
import subprocess
import sys

import gymnasium
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.environments.base import MAX_DETAIL_CHARS, EnvironmentFailure
from skyrl_async.environments.number_guess import NumberGuess
from skyrl_async.environments.registry import (
    check_environment,
    find_environment,
    known_environments,
    make_environment,
)
from skyrl_async.environments.spaces import UnicodeText
from skyrl_async.types import DropReason

HERE = "tests.environments.test_registry"


class NeedsPath:
    def __init__(self, path, *, depth=1):
        self.path = path

    def reset(self, *, seed=None, options=None):
        return "", {}

    def step(self, action):
        return "", 0.0, True, False, {}


class TakesAnything(NeedsPath):
    def __init__(self, **options):
        self.options = options


class RaisesTypeError(NeedsPath):
    def __init__(self):
        raise TypeError("of its own")


class Exits(NeedsPath):
    def __init__(self):
        sys.exit("no sandbox")


class HalfAsync(NeedsPath):
    async def reset(self, *, seed=None, options=None):
        return "", {}


class FullyAsync(HalfAsync):
    async def step(self, action):
        return "", 0.0, True, False, {}


class NoStep:
    def reset(self, *, seed=None, options=None):
        return "", {}


class NoSeed(NeedsPath):
    def reset(self):
        return "", {}


def test_short_names_and_entry_points_make_environments():
    assert known_environments() == ("arithmetic", "largest_digit", "number_guess")
    assert isinstance(make_environment("number_guess", {"high": 15}), NumberGuess)
    entry_point = "skyrl_async.environments.number_guess:NumberGuess"
    assert type(make_environment(entry_point)) is NumberGuess
    assert make_environment(f"{HERE}:TakesAnything", {"a": 1}).options == {"a": 1}


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"arithmetic, largest_digit, number_guess.*did you mean"):
        make_environment("number_gess")
    with pytest.raises(ValueError, match="has no class 'NeedPath'; did you mean 'NeedsPath'"):
        make_environment(f"{HERE}:NeedPath")
    with pytest.raises(ValueError, match="importing 'no_such_module' failed"):
        make_environment("no_such_module:Game")


def test_a_registered_environment_has_a_short_name_and_its_options():
    gymnasium.register(
        id="skyrl_async/my_game-v0", entry_point=f"{HERE}:NeedsPath", kwargs={"path": "a"}
    )
    try:
        assert "my_game" in known_environments()
        assert make_environment("my_game").path == "a"
        assert make_environment("my_game", {"path": "b"}).path == "b"
        check_environment("my_game")
    finally:
        del gymnasium.registry["skyrl_async/my_game-v0"]


@pytest.mark.parametrize("make", [make_environment, check_environment])
def test_wrong_options_name_the_option_and_the_accepted_ones(make):
    with pytest.raises(ValueError, match=r"no option 'hihg'.*low, high, max_guesses.*'high'\?"):
        make("number_guess", {"hihg": 3})
    with pytest.raises(ValueError, match="needs option 'path'; it accepts path, depth"):
        make(f"{HERE}:NeedsPath")


def test_a_type_error_of_the_environment_itself_is_not_hidden():
    with pytest.raises(TypeError, match="of its own"):
        make_environment(f"{HERE}:RaisesTypeError")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("number_guess", {"low": 9, "high": 3}, r"cannot be made with options .*low=9"),
        (f"{HERE}:RaisesTypeError", {}, "cannot be made with options"),
        (f"{HERE}:Exits", {}, "SystemExit: no sandbox"),
        (f"{HERE}:HalfAsync", {"path": ""}, "must both be async def"),
        (f"{HERE}:NoStep", {}, "no method 'step'"),
        (f"{HERE}:NoSeed", {"path": ""}, "reset must be callable as"),
    ],
)
def test_check_environment_finds_what_is_wrong_before_a_run(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_environment(name, options)


def test_check_environment_accepts_what_can_be_played():
    check_environment("number_guess", {"low": 1, "high": 15, "max_guesses": 4})
    check_environment(f"{HERE}:FullyAsync", {"path": "a"})
    assert find_environment(f"{HERE}:FullyAsync").is_async
    assert not find_environment("number_guess").is_async


def test_importing_the_package_is_cheap():
    code = (
        "import sys; import skyrl_async.environments.base, skyrl_async.environments.host, "
        "skyrl_async.environments.registry, skyrl_async.environments.tasks; "
        "sys.exit(bool({'gymnasium', 'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_failure_pickles_and_has_one_short_line():
    failure = EnvironmentFailure(DropReason.STEP_TIMEOUT, "too\nslow " * 1000)
    copy = pickle.loads(pickle.dumps(failure))
    assert (copy.reason, copy.detail) == (failure.reason, failure.detail)
    assert "\n" not in copy.detail
    assert len(copy.detail) == MAX_DETAIL_CHARS
    assert str(copy).startswith("step_timeout: too slow")


@given(st.integers(0, 200), st.integers(0, 100))
def test_unicode_text_contains_what_it_samples(max_length, seed):
    space = UnicodeText(max_length, seed=seed)
    text = space.sample()
    assert space.contains(text)
    text.encode()
    assert "" in space
    assert "x" * (max_length + 1) not in space
    assert b"x" not in space
    assert UnicodeText(max_length, seed=seed).sample() == text
    assert space == UnicodeText(max_length) != UnicodeText(max_length + 1)
