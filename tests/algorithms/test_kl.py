"""KL estimators: their formulas, and the expectations of values and gradients, enumerated exactly.

Expectations are over a vocabulary small enough to sum over, so they have no sampling error.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.kl import k1, k2, k3, unbiased_k3
from tests.algorithms import literal_corrections as literal

LOGPROB = st.floats(-6, -0.01)
TRIPLES = st.lists(st.tuples(LOGPROB, LOGPROB, LOGPROB), min_size=1, max_size=12)


def logprobs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)


def expectation(estimator, logits, reference, sampler):
    """Value and gradient by the logits of an estimator, averaged over tokens of ``sampler``."""
    logits = logits.clone().requires_grad_()
    current = logits.log_softmax(-1)
    value = (sampler.exp() * estimator(current, reference, sampler)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def reverse_kl(logits, reference):
    """Value and gradient by the logits of KL(current || reference)."""
    logits = logits.clone().requires_grad_()
    current = logits.log_softmax(-1)
    value = (current.exp() * (current - reference)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def forward_kl(logits, reference):
    """Value and gradient by the logits of KL(reference || current)."""
    logits = logits.clone().requires_grad_()
    value = (reference.exp() * (reference - logits.log_softmax(-1))).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def as_k1(current, reference, _behavior):
    return k1(current - reference)


def as_k2(current, reference, _behavior):
    return k2(current - reference)


def as_k3(current, reference, _behavior):
    return k3(current - reference)


def as_unbiased(current, reference, behavior):
    return unbiased_k3(current - reference, log_ratios_to_behavior=current - behavior)


@settings(deadline=None, max_examples=100)
@given(TRIPLES)
def test_values_and_gradients_equal_the_literal_formulas(triples):
    current, reference, behavior = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*triples, strict=True)
    )
    current.requires_grad_()
    for estimator, expected in (
        (as_k1, [(c - r, 1.0) for c, r, _ in triples]),
        (as_k2, [((c - r) ** 2 / 2, c - r) for c, r, _ in triples]),
        (
            as_k3,
            [(literal.k3(math.exp(c), math.exp(r)), 1 - math.exp(r - c)) for c, r, _ in triples],
        ),
        (
            as_unbiased,
            [
                (
                    math.exp(c) / math.exp(b) * literal.k3(math.exp(c), math.exp(r)),
                    math.exp(c - b) * (literal.k3(math.exp(c), math.exp(r)) + 1 - math.exp(r - c)),
                )
                for c, r, b in triples
            ],
        ),
    ):
        values = estimator(current, reference, behavior)
        (gradient,) = torch.autograd.grad(values.sum(), current)
        assert values.tolist() == pytest.approx([v for v, _ in expected], rel=1e-10, abs=1e-10)
        assert gradient.tolist() == pytest.approx([g for _, g in expected], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_on_policy_values_of_k1_and_k3_are_unbiased_and_that_of_k2_is_not(seed):
    logits, reference = logprobs(seed), logprobs(100 + seed)
    exact, _ = reverse_kl(logits, reference)
    for estimator in (as_k1, as_k3):
        value, _ = expectation(estimator, logits, reference, sampler=logits)
        assert value.item() == pytest.approx(exact.item(), abs=1e-12)
    value, _ = expectation(as_k2, logits, reference, sampler=logits)
    assert abs(value - exact).item() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_on_policy_gradient_of_k1_has_expectation_zero_whatever_the_reference(seed):
    logits, reference = logprobs(seed), logprobs(100 + seed)
    _, gradient = expectation(as_k1, logits, reference, sampler=logits)
    assert gradient.abs().max().item() == pytest.approx(0, abs=1e-12)
    assert reverse_kl(logits, reference)[1].abs().max().item() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_on_policy_gradient_of_k2_is_that_of_the_reverse_divergence(seed):
    logits, reference = logprobs(seed), logprobs(100 + seed)
    _, gradient = expectation(as_k2, logits, reference, sampler=logits)
    torch.testing.assert_close(gradient, reverse_kl(logits, reference)[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_on_policy_gradient_of_k3_is_that_of_the_forward_divergence(seed):
    logits, reference = logprobs(seed), logprobs(100 + seed)
    _, gradient = expectation(as_k3, logits, reference, sampler=logits)
    torch.testing.assert_close(gradient, forward_kl(logits, reference)[1], atol=1e-12, rtol=0)
    assert (gradient - reverse_kl(logits, reference)[1]).abs().max().item() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_unbiased_k3_has_value_and_gradient_of_the_reverse_divergence_on_any_policys_tokens(seed):
    logits, reference = logprobs(seed), logprobs(100 + seed)
    exact, exact_gradient = reverse_kl(logits, reference)
    for behavior in (logits, logprobs(200 + seed)):
        value, gradient = expectation(as_unbiased, logits, reference, sampler=behavior)
        assert value.item() == pytest.approx(exact.item(), abs=1e-12)
        torch.testing.assert_close(gradient, exact_gradient, atol=1e-12, rtol=0)


def test_k3_without_the_importance_weight_is_biased_off_policy():
    logits, reference, behavior = logprobs(0), logprobs(100), logprobs(200)
    value, _ = expectation(as_k3, logits, reference, sampler=behavior)
    assert abs(value - reverse_kl(logits, reference)[0]).item() > 1e-3


@pytest.mark.parametrize("estimator", [as_k2, as_k3, as_unbiased])
def test_at_the_reference_value_and_gradient_are_exactly_zero(estimator):
    current = torch.linspace(-5, -0.1, 7, dtype=torch.float32, requires_grad=True)
    values = estimator(current, current.detach(), current.detach() - 0.5)
    values.sum().backward()
    assert values.tolist() == [0.0] * 7
    assert current.grad is not None
    assert current.grad.tolist() == [0.0] * 7


def test_k1_at_the_reference_still_has_a_gradient_of_one():
    current = torch.full((3,), -1.0, requires_grad=True)
    k1(current - current.detach()).sum().backward()
    assert current.grad is not None
    assert current.grad.tolist() == [1.0] * 3


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=10))
def test_k2_and_k3_are_never_negative(log_ratios):
    values = torch.tensor(log_ratios, dtype=torch.float64)
    assert k2(values).min().item() >= 0
    assert k3(values).min().item() >= -1e-15


def test_clamp_changes_only_tokens_beyond_it_and_takes_their_gradient():
    log_ratios = torch.tensor([-200.0, -9.0, 0.5, 9.0, 200.0], requires_grad=True)
    values = k3(log_ratios, clamp=10)
    values.sum().backward()
    assert log_ratios.grad is not None
    free = torch.tensor([-9.0, 0.5, 9.0], requires_grad=True)
    k3(free).sum().backward()
    assert free.grad is not None
    assert values[1:4].tolist() == k3(free).tolist()
    assert log_ratios.grad[1:4].tolist() == free.grad.tolist()
    assert values[[0, 4]].tolist() == pytest.approx([math.expm1(10) - 10, math.expm1(-10) + 10])
    assert log_ratios.grad[[0, 4]].tolist() == [0.0, 0.0]
    assert k3(torch.tensor([-200.0])).isinf().item()


def test_clamp_of_unbiased_k3_leaves_the_gradient_of_the_weight():
    log_ratio = torch.tensor([-20.0], dtype=torch.float64, requires_grad=True)
    value = unbiased_k3(log_ratio, log_ratios_to_behavior=log_ratio + 19, clamp=10)
    value.backward()
    assert log_ratio.grad is not None
    expected = math.exp(-1) * (math.expm1(10) - 10)
    assert value.item() == pytest.approx(expected)
    assert log_ratio.grad.item() == pytest.approx(expected)


def test_no_tokens_give_no_values():
    empty = torch.zeros(0)
    assert [f(empty).shape for f in (k1, k2, k3)] == [(0,)] * 3
    assert unbiased_k3(empty, log_ratios_to_behavior=empty).shape == (0,)
