import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.algorithms.advantages import grpo, mean_centered

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


@given(REWARDS)
def test_mean_centered_equals_the_literal_formula(rewards):
    mean = sum(rewards) / len(rewards)
    expected = [r - mean for r in rewards]
    assert mean_centered(np.array(rewards)) == pytest.approx(expected, abs=1e-9)


@given(REWARDS)
def test_grpo_equals_the_literal_formula(rewards):
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    expected = [(r - mean) / (std + 1e-6) for r in rewards]
    assert grpo(np.array(rewards)) == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_give_zero_and_no_nan():
    assert grpo(np.ones(8)).tolist() == [0.0] * 8
    assert mean_centered(np.zeros(8)).tolist() == [0.0] * 8
