"""V-trace and Retrace against double loops, and against GAE where they must be the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.algorithms.off_policy_returns import retrace, vtrace
from skyrl_async.algorithms.returns import gae
from tests.algorithms import literal_advantages as literal
from tests.algorithms.token_batches import (
    DISCOUNTS,
    LENGTHS,
    PROPERTY,
    SEEDS,
    assert_close,
    random_batch,
    sequences,
)


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS, st.sampled_from([(1, 1), (2, 1), (3, 2), (0.5, 0.3)]))
def test_vtrace_equals_the_literal_formula(lengths, seed, gamma, lam, caps):
    b = random_batch(lengths, seed)
    weighted, unweighted = (
        vtrace(
            b.rewards,
            b.values,
            b.sequence_ids,
            b.log_importance,
            gamma=gamma,
            lam=lam,
            rho_cap=caps[0],
            c_cap=caps[1],
            weighted_advantages=choice,
            bootstrap_values=b.bootstrap_values,
        )
        for choice in (True, False)
    )
    for tokens, after in sequences(b):
        targets, with_rho, without = literal.vtrace(
            b.rewards[tokens].tolist(),
            [*b.values[tokens].tolist(), after],
            b.log_importance[tokens].exp().tolist(),
            gamma,
            lam,
            *caps,
        )
        assert_close(weighted.targets[tokens], targets)
        assert_close(unweighted.targets[tokens], targets)
        assert_close(weighted.advantages[tokens], with_rho)
        assert_close(unweighted.advantages[tokens], without)


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS)
def test_retrace_equals_the_literal_formula(lengths, seed, gamma, lam):
    b = random_batch(lengths, seed)
    result = retrace(
        b.rewards,
        b.values,
        b.sequence_ids,
        b.log_importance,
        gamma=gamma,
        lam=lam,
        bootstrap_values=b.bootstrap_values,
    )
    for tokens, after in sequences(b):
        advantages, targets = literal.retrace(
            b.rewards[tokens].tolist(),
            [*b.values[tokens].tolist(), after],
            b.log_importance[tokens].exp().tolist(),
            gamma,
            lam,
        )
        assert_close(result.advantages[tokens], advantages)
        assert_close(result.targets[tokens], targets)


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS, st.sampled_from([(1.0, 1.0), (2.0, 1.5)]))
def test_on_policy_all_of_them_are_gae(lengths, seed, gamma, lam, caps):
    b = random_batch(lengths, seed)
    arguments = (b.rewards, b.values, b.sequence_ids)
    options = {"gamma": gamma, "lam": lam, "bootstrap_values": b.bootstrap_values}
    expected = gae(*arguments, **options)
    on_policy = torch.zeros_like(b.rewards)
    of_vtrace = vtrace(
        *arguments, on_policy, rho_cap=caps[0], c_cap=caps[1], lam_in_advantages=True, **options
    )
    of_retrace = retrace(*arguments, on_policy, **options)
    for result in (of_vtrace, of_retrace):
        assert_close(result.advantages, expected.advantages.tolist())
        assert_close(result.targets, expected.targets.tolist())
    plain = vtrace(*arguments, on_policy, **options)
    assert_close(plain.targets, expected.targets.tolist())
    if lam == 1:
        assert_close(plain.advantages, expected.advantages.tolist())


def test_vtrace_advantages_look_ahead_in_full_unless_told_otherwise():
    rewards, values = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 0.25]).double()
    ids, on_policy = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    # The target of the second token is its reward, 1; its value is 0.25.
    full = vtrace(rewards, values, ids, on_policy, lam=0.5)
    mixed = vtrace(rewards, values, ids, on_policy, lam=0.5, lam_in_advantages=True)
    assert_close(full.advantages, [1 - 0.5, 0.75])
    assert_close(mixed.advantages, [(0.5 * 0.25 + 0.5 * 1) - 0.5, 0.75])


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS)
def test_retrace_is_vtrace_with_caps_of_one(lengths, seed, gamma, lam):
    b = random_batch(lengths, seed)
    arguments = (b.rewards, b.values, b.sequence_ids, b.log_importance)
    options = {"gamma": gamma, "lam": lam, "bootstrap_values": b.bootstrap_values}
    result = retrace(*arguments, **options)
    expected = vtrace(*arguments, weighted_advantages=False, lam_in_advantages=True, **options)
    assert_close(result.targets, expected.targets.tolist())
    assert_close(result.advantages, expected.advantages.tolist())


@PROPERTY
@given(LENGTHS, SEEDS)
def test_weighting_vtrace_advantages_is_a_multiplication_with_the_truncated_weight(lengths, seed):
    b = random_batch(lengths, seed)
    arguments = (b.rewards, b.values, b.sequence_ids, b.log_importance)
    weighted = vtrace(*arguments, rho_cap=1.5)
    unweighted = vtrace(*arguments, rho_cap=1.5, weighted_advantages=False)
    rho = b.log_importance.exp().clamp(max=1.5)
    assert_close(weighted.advantages, (rho * unweighted.advantages).tolist())


def test_vtrace_with_huge_weights_is_that_of_the_caps_and_with_none_keeps_the_values():
    b = random_batch([5, 3], 0)
    arguments = (b.rewards, b.values, b.sequence_ids)
    huge = vtrace(*arguments, torch.full_like(b.rewards, 1e6))
    on_policy = vtrace(*arguments, torch.zeros_like(b.rewards))
    assert_close(huge.targets, on_policy.targets.tolist())
    assert_close(huge.advantages, on_policy.advantages.tolist())
    none = vtrace(*arguments, torch.full_like(b.rewards, -torch.inf))
    assert_close(none.targets, b.values.tolist())
    assert_close(none.advantages, [0.0] * 8)


def test_a_trace_cap_above_that_of_errors_is_refused():
    b = random_batch([3], 8)
    with pytest.raises(ValueError, match=r"c_cap 2.0 is above rho_cap 1.0"):
        vtrace(b.rewards, b.values, b.sequence_ids, b.log_importance, c_cap=2.0)
