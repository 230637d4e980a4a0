"""Combinations that the lab cannot run are refused, with the value, the limit and the remedy."""

from __future__ import annotations

import pytest

from skyrl_async.config_loading import ConfigError, load_config
from skyrl_async.preflight import describe_run

LAG = ("runtime=local", "lab.exact_lag=8", "staleness.max=8")


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_an_exact_lag_is_accepted():
    config = load_config(None, LAG)
    assert config.lab.exact_lag == 8


def test_a_dry_run_says_what_the_lag_will_be_and_what_it_keeps():
    text = describe_run(load_config(None, LAG))
    assert "exactly 8 versions after the first 8 steps" in text
    assert "of older weights beside the learner" in text
    assert "older weights" not in describe_run(load_config(None, ["runtime=local"]))


def test_without_an_exact_lag_the_lab_changes_nothing():
    lab = load_config(None).lab
    assert (lab.exact_lag, lab.logprob_noise, lab.straggler_fraction) == (None, 0, 0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("staleness.max=9", "set staleness.max=8"),
        ("replay.max_times_sampled=2", "set replay.max_times_sampled=1"),
        ("engine.kind=sglang", "set engine.kind=embedded"),
        ("guard.enabled=true", "set guard.enabled=false"),
        ("run.resume=somewhere", "set run.resume=never"),
        ("lab.exact_lag=2000", "lab.exact_lag"),
    ],
)
def test_what_an_exact_lag_rules_out(override: str, words: str):
    assert words in problems(*LAG, override)


def test_sharded_weights_have_no_exact_lag_but_copies_on_each_rank_do():
    ranks = ("lab.exact_lag=8", "staleness.max=8", "learner.num_ranks=2")
    assert "set learner.shard_ranks=1" in problems(*ranks)
    assert load_config(None, [*ranks, "learner.shard_ranks=1"]).lab.exact_lag == 8


@pytest.mark.parametrize("override", ["lab.straggler_fraction=0.2", "lab.straggler_factor=3"])
def test_stragglers_need_a_share_and_a_factor(override: str):
    assert "no episode would be slowed" in problems(override)


def test_negative_noise_is_refused():
    assert "lab.logprob_noise" in problems("lab.logprob_noise=-1")
