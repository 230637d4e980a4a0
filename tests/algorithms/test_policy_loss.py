"""The loss against its formula, token by token in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.policy_loss import decoupled_ppo, importance_weights

TOKEN = st.tuples(
    st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-3, 3)
)


def literal_loss(
    tokens: list[tuple[float, float, float, float]], low: float, high: float, cap: float
) -> float:
    total = 0.0
    for current, proximal, behavior, advantage in tokens:
        weight = min(math.exp(proximal - behavior), cap)
        ratio = math.exp(current - proximal)
        clipped = min(max(ratio, 1 - low), 1 + high)
        total += -weight * min(ratio * advantage, clipped * advantage)
    return total


def loss_of(tokens: list[tuple[float, float, float, float]], current: torch.Tensor | None = None):
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True)]
    return decoupled_ppo(
        columns[0] if current is None else current,
        proximal_logprobs=columns[1],
        behavior_logprobs=columns[2],
        advantages=columns[3],
        clip_low=0.2,
        clip_high=0.28,
        importance_weight_cap=2.0,
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(TOKEN, min_size=1, max_size=20))
def test_loss_equals_the_literal_formula(tokens):
    assert loss_of(tokens).loss.item() == pytest.approx(
        literal_loss(tokens, 0.2, 0.28, 2.0), rel=1e-9, abs=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(TOKEN, min_size=2, max_size=20), st.integers(1, 19))
def test_loss_and_sums_do_not_depend_on_the_split(tokens, cut):
    cut = min(cut, len(tokens) - 1)
    whole, parts = loss_of(tokens), [loss_of(tokens[:cut]), loss_of(tokens[cut:])]
    assert whole.loss.item() == pytest.approx(sum(p.loss.item() for p in parts), abs=1e-9)
    for name, value in whole.sums.items():
        total = sum(p.sums[name].item() for p in parts)
        assert value.item() == pytest.approx(total, abs=1e-6), name


def test_importance_weight_carries_no_gradient_and_clipped_tokens_none_either():
    # advantage 1: ratio exp(0.5) is above 1.28, so clipped; ratio exp(0) = 1 is not.
    tokens = [(-1.0, -1.5, -2.0, 1.0), (-1.0, -1.0, -1.2, 1.0)]
    current = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    result = loss_of(tokens, current)
    result.loss.backward()
    assert current.grad is not None
    assert current.grad[0].item() == 0.0
    assert current.grad[1].item() == pytest.approx(-math.exp(0.2))
    assert result.sums["clipped"].item() == 1


def test_weights_are_truncated_at_the_cap_and_the_maximum_is_reported_before_it():
    weights = importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-4.0, -1.5]), cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, math.exp(0.5)])
    result = loss_of([(-1.0, -1.0, -4.0, 1.0), (-1.0, -1.0, -1.5, 1.0)])
    assert result.maxima["importance_weight"].item() == pytest.approx(math.exp(3.0))
    assert result.sums["importance_weight_capped"].item() == 1


def test_no_loss_tokens_give_zero():
    empty = torch.zeros(0)
    result = decoupled_ppo(
        empty,
        proximal_logprobs=empty,
        behavior_logprobs=empty,
        advantages=empty,
        clip_low=0.2,
        clip_high=0.2,
        importance_weight_cap=2.0,
    )
    assert result.loss.item() == 0.0
    assert result.maxima["importance_weight"].item() == 0.0


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        decoupled_ppo(
            torch.zeros(2),
            proximal_logprobs=torch.zeros(2),
            behavior_logprobs=torch.zeros(3),
            advantages=torch.zeros(2),
            clip_low=0.2,
            clip_high=0.2,
            importance_weight_cap=2.0,
        )
