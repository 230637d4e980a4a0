"""Every method of the catalogue is used by a learner step of the configuration that it names."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import CodeType, FrameType
from typing import Any

import pytest

from skyrl_async.algorithms.catalogue import entries
from skyrl_async.config_loading import load_config
from skyrl_async.learner.learner import Learner
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.runtime.settings import learner_settings
from tests.records import random_batch

ENTRIES = {entry.name: entry for entry in entries()}
WITH_CRITIC = ("algorithm.advantage=gae", "critic.kind=model")
# What a method takes for granted, beyond what it names.
BESIDES = {
    "kl_in_reward": WITH_CRITIC,
    "overlong_penalty": ("engine.context_length=128",),
}


@cache
def model() -> Any:
    return build_tiny_model(hidden_size=16, num_heads=2)


def codes_run(call: Callable[[], object]) -> set[CodeType]:
    """Return the code of every function that runs during a call."""
    seen: set[CodeType] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def step_codes(overrides: tuple[str, ...]) -> set[CodeType]:
    """Return the code of every function that one learner step runs."""
    config = load_config(None, [*overrides, "staleness.max=2"])
    settings = learner_settings(config)
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2),
        replace(settings, num_minibatches=1),
        reference=model(),
        teacher=model(),
    )
    return codes_run(lambda: learner.step(random_batch(0, train_version=0)))


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_a_step_of_the_configuration_that_a_method_names_runs_it(name, tmp_path):
    entry = ENTRIES[name]
    named = tuple(override.replace("PATH", str(tmp_path)) for override in entry.configuration)
    function = entry.function
    code = getattr(function, "__wrapped__", function).__code__
    besides = BESIDES.get(name, ())
    assert code in step_codes((*besides, *named))


@pytest.mark.parametrize("name", ["vtrace", "gspo", "sequence_mask", "k2", "ess_rate_scale"])
def test_without_it_the_step_does_not(name):
    function = ENTRIES[name].function
    assert getattr(function, "__wrapped__", function).__code__ not in step_codes(())
