"""What holds for every function that makes returns: batches, precision, bad input."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skyrl_async.algorithms.off_policy_returns import retrace, vtrace
from skyrl_async.algorithms.returns import (
    Returns,
    gae,
    reinforce_plus_plus_returns,
    turn_level_gae,
)
from tests.algorithms.token_batches import LENGTHS, PROPERTY, SEEDS, random_batch

# Each with two options away from their defaults, bootstrapped values among them.
ALL = {
    "gae": lambda b: gae(b.rewards, b.values, b.sequence_ids, gamma=0.9, lam=0.8),
    "turn_level_gae": lambda b: turn_level_gae(
        b.rewards, b.values, b.sequence_ids, b.turn_ids, gamma=0.9, lam=0.8
    ),
    "vtrace": lambda b: vtrace(
        b.rewards,
        b.values,
        b.sequence_ids,
        b.log_importance,
        gamma=0.9,
        rho_cap=2.0,
        bootstrap_values=b.bootstrap_values,
    ),
    "retrace": lambda b: retrace(
        b.rewards,
        b.values,
        b.sequence_ids,
        b.log_importance,
        lam=0.8,
        bootstrap_values=b.bootstrap_values,
    ),
    "reinforce_plus_plus_returns": lambda b: returns_twice(
        reinforce_plus_plus_returns(b.rewards, b.kl, b.sequence_ids, beta=0.1)
    ),
}
EVERY = pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())


def returns_twice(returns: Tensor) -> Returns:
    return Returns(advantages=returns, targets=returns)


@EVERY
@PROPERTY
@given(LENGTHS, SEEDS)
def test_the_order_of_sequences_does_not_matter(function, lengths, seed):
    b = random_batch(lengths, seed)
    order = np.random.default_rng(seed).permutation(len(lengths))
    tokens = torch.cat(
        [torch.zeros(0, dtype=torch.int64)]
        + [(b.sequence_ids == s).nonzero().flatten() for s in order]
    )
    result, moved = function(b), function(b.select(tokens))
    assert torch.equal(moved.advantages, result.advantages[tokens])
    assert torch.equal(moved.targets, result.targets[tokens])


@EVERY
@PROPERTY
@given(LENGTHS, SEEDS, st.integers(0, 7))
def test_sequences_do_not_depend_on_each_other(function, lengths, seed, cut):
    b = random_batch(lengths, seed)
    whole = function(b)
    parts = [function(b.select(part)) for part in (b.sequence_ids < cut, b.sequence_ids >= cut)]
    assert torch.equal(torch.cat([p.advantages for p in parts]), whole.advantages)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)


@EVERY
def test_no_tokens_give_empty_results(function):
    for lengths in ([], [0], [0, 0, 0]):
        result = function(random_batch(lengths, 0))
        assert result.advantages.shape == result.targets.shape == (0,)


@EVERY
def test_nothing_carries_a_gradient(function):
    b = random_batch([4, 0, 6], 3)
    inputs = {
        name: getattr(b, name).clone().requires_grad_()
        for name in ("rewards", "values", "log_importance", "kl", "bootstrap_values")
    }
    result = function(replace(b, **inputs))
    assert not result.advantages.requires_grad
    assert not result.targets.requires_grad


@EVERY
def test_half_precision_inputs_give_float32_results(function):
    b = random_batch([4, 0, 6], 4)
    names = ("rewards", "values", "log_importance", "kl", "bootstrap_values")
    halves = {name: getattr(b, name).bfloat16() for name in names}
    result = function(replace(b, **halves))
    assert result.advantages.dtype == result.targets.dtype == torch.float32
    exact = function(replace(b, **{name: half.double() for name, half in halves.items()}))
    # exp is taken in float32, so that only its rounding and that of sums is left.
    torch.testing.assert_close(result.advantages.double(), exact.advantages, rtol=0, atol=1e-4)


@EVERY
def test_inputs_are_left_as_they_were(function):
    b = random_batch([4, 0, 6], 5)
    copies = {f.name: getattr(b, f.name).clone() for f in fields(b) if f.name != "lengths"}
    function(b)
    for name, copy in copies.items():
        assert torch.equal(getattr(b, name), copy), name


@EVERY
def test_tokens_of_a_sequence_that_are_apart_are_refused(function):
    b = replace(random_batch([3], 6), sequence_ids=torch.tensor([0, 1, 0]))
    b = replace(b, bootstrap_values=torch.zeros(2))
    with pytest.raises(ValueError, match="next to each other"):
        function(b)


@EVERY
def test_unequal_shapes_are_refused(function):
    b = random_batch([3], 7)
    with pytest.raises(ValueError, match="one shape"):
        function(replace(b, sequence_ids=torch.zeros(4, dtype=torch.int64)))
