"""The critic loss against its formula, gradient included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.value_loss import clipped_value_loss
from tests.algorithms import literal_corrections as literal

TOKENS = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=20
)


def columns_of(tokens):
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)]


def random_tokens(seed: int) -> list[tuple[float, float, float]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 3, generator=generator, dtype=torch.float64).tolist()


@settings(deadline=None, max_examples=100)
@given(TOKENS, st.floats(0.05, 1.0))
def test_loss_equals_the_literal_formula(tokens, clip):
    values, old, targets = columns_of(tokens)
    result = clipped_value_loss(values, old_values=old, targets=targets, clip=clip)
    expected = [literal.value_loss(*token, clip)[0] for token in tokens]
    assert result.loss.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_gradient_equals_the_literal_formula_and_is_zero_where_clipped(seed):
    tokens = random_tokens(seed)
    values, old, targets = columns_of(tokens)
    values.requires_grad_()
    result = clipped_value_loss(values, old_values=old, targets=targets, clip=0.3)
    result.loss.sum().backward()
    assert values.grad is not None
    expected = [literal.value_loss(*token, 0.3)[1] for token in tokens]
    assert values.grad.tolist() == pytest.approx(expected, abs=1e-10)
    assert 0 < result.clipped.sum().item() < len(tokens)
    assert values.grad[result.clipped].abs().max().item() == 0


def test_only_steps_towards_the_target_are_clipped():
    # Old value 0, clip range 0.2: beyond it towards the target, beyond it away, within it.
    values = torch.tensor([0.5, -0.5, 0.1])
    result = clipped_value_loss(values, old_values=torch.zeros(3), targets=torch.ones(3), clip=0.2)
    assert result.clipped.tolist() == [True, False, False]
    assert result.loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 1.5**2, 0.5 * 0.9**2])


@settings(deadline=None, max_examples=50)
@given(TOKENS)
def test_loss_is_never_below_the_squared_error_which_no_clip_gives(tokens):
    values, old, targets = columns_of(tokens)
    plain = clipped_value_loss(values, old_values=old, targets=targets, clip=None)
    assert plain.loss.tolist() == pytest.approx(
        [0.5 * (v - target) ** 2 for v, _, target in tokens], abs=1e-12
    )
    assert not plain.clipped.any()
    clipped = clipped_value_loss(values, old_values=old, targets=targets, clip=0.1)
    assert (clipped.loss >= plain.loss).all()


def test_at_the_old_values_nothing_is_clipped_and_the_gradient_is_the_error():
    values = torch.tensor([0.5, -1.0], requires_grad=True)
    targets = torch.tensor([2.0, -3.0])
    result = clipped_value_loss(values, old_values=values, targets=targets, clip=0.2)
    result.loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-1.5, 2.0]
    assert result.clipped.tolist() == [False, False]


def test_targets_and_old_values_get_no_gradient():
    values = torch.tensor([0.5], requires_grad=True)
    old, targets = torch.tensor([0.4], requires_grad=True), torch.ones(1, requires_grad=True)
    clipped_value_loss(values, old_values=old, targets=targets, clip=0.2).loss.sum().backward()
    assert values.grad is not None
    assert old.grad is None
    assert targets.grad is None


def test_no_tokens_give_no_loss():
    empty = torch.zeros(0)
    result = clipped_value_loss(empty, old_values=empty, targets=empty, clip=0.2)
    assert result.loss.shape == result.clipped.shape == (0,)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        clipped_value_loss(
            torch.zeros(2), old_values=torch.zeros(2), targets=torch.zeros(1), clip=0.2
        )
