"""Reward terms against their formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.algorithms.reward_shaping import kl_in_reward, overlong_penalty

F64 = torch.float64


def literal_overlong(length: float, max_length: int, buffer: int) -> float:
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return (max_length - buffer - length) / buffer
    return -1.0


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), max_size=20), st.floats(0, 2))
def test_kl_in_reward_equals_the_literal_formula(tokens, coefficient):
    rewards, log_ratios = (torch.tensor([t[i] for t in tokens], dtype=F64) for i in (0, 1))
    expected = [reward - coefficient * log_ratio for reward, log_ratio in tokens]
    shaped = kl_in_reward(rewards, log_ratios, coefficient=coefficient)
    assert shaped.tolist() == pytest.approx(expected, abs=1e-10)


def test_kl_in_reward_at_the_reference_or_without_coefficient_is_the_reward():
    rewards = torch.tensor([0.0, 0.0, 1.0])
    assert torch.equal(kl_in_reward(rewards, torch.zeros(3), coefficient=0.1), rewards)
    assert torch.equal(kl_in_reward(rewards, torch.ones(3), coefficient=0.0), rewards)


def test_kl_in_reward_leaves_its_arguments_as_they_were_and_carries_no_gradient():
    rewards, log_ratios = torch.zeros(2), torch.ones(2, requires_grad=True)
    shaped = kl_in_reward(rewards, log_ratios, coefficient=0.5)
    assert (rewards.tolist(), log_ratios.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert shaped.tolist() == [-0.5, -0.5]
    assert not shaped.requires_grad


def test_kl_in_reward_refuses_unequal_shapes_and_negative_coefficients():
    with pytest.raises(ValueError, match=r"rewards \(2,\) and log ratios \(1,\) differ in shape"):
        kl_in_reward(torch.zeros(2), torch.zeros(1), coefficient=0.1)
    for coefficient in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"coefficient={coefficient}"):
            kl_in_reward(torch.zeros(2), torch.zeros(2), coefficient=coefficient)


@given(st.lists(st.integers(0, 400), max_size=20), st.integers(1, 300), st.integers(1, 300))
def test_overlong_penalty_equals_the_literal_formula(lengths, first, second):
    buffer, max_length = sorted((first, second))
    expected = [literal_overlong(length, max_length, buffer) for length in lengths]
    of_array = overlong_penalty(np.array(lengths), max_length=max_length, buffer=buffer)
    of_numbers = [overlong_penalty(n, max_length=max_length, buffer=buffer) for n in lengths]
    assert of_array.tolist() == pytest.approx(expected, abs=1e-10)
    assert of_numbers == pytest.approx(expected, abs=1e-10)


def test_overlong_penalty_at_its_corners():
    # The published setting: 20480 tokens at most, the last 4096 of them penalized.
    lengths = {16384: 0.0, 18432: -0.5, 20480: -1.0, 30000: -1.0}
    for length, penalty in lengths.items():
        assert overlong_penalty(length, max_length=20480, buffer=4096) == penalty


def test_overlong_penalty_gives_a_plain_number_for_one_and_an_array_for_an_array():
    assert isinstance(overlong_penalty(5, max_length=10, buffer=4), float)
    result = overlong_penalty(np.array([[5, 9]]), max_length=10, buffer=4)
    assert isinstance(result, np.ndarray)
    assert result.tolist() == [[0.0, -0.75]]


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_overlong_penalty_refuses_a_buffer_outside_the_reply(buffer):
    with pytest.raises(ValueError, match=f"buffer={buffer}: .*max_length=10"):
        overlong_penalty(5, max_length=10, buffer=buffer)
