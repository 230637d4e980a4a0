"""Returns against double loops over one sequence at a time, and against each other."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyrl_async.algorithms.returns import (
    Returns,
    gae,
    length_adaptive_lambdas,
    reinforce_plus_plus_returns,
    retrace,
    skip_observation_gae,
    turn_level_gae,
    turn_starts,
    vtrace,
)
from tests.algorithms import literal_advantages as literal

# Sequences without tokens among them, one token, equal and different lengths.
LENGTHS = st.lists(st.integers(0, 8), max_size=7)
SEEDS = st.integers(0, 2**32 - 1)
DISCOUNTS = st.sampled_from([0.0, 0.5, 0.9, 1.0])
PROPERTY = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Batch:
    """Tokens of random sequences; ``lengths`` of all S, empty ones too."""

    lengths: list[int]
    sequence_ids: Tensor
    rewards: Tensor
    values: Tensor
    log_importance: Tensor
    kl: Tensor
    turn_ids: Tensor
    action_mask: Tensor
    bootstrap_values: Tensor

    def select(self, tokens: Tensor) -> "Batch":
        per_token = {f.name for f in fields(self)} - {"lengths", "bootstrap_values"}
        return replace(self, **{name: getattr(self, name)[tokens] for name in per_token})


def random_batch(lengths: list[int], seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    turns = [np.cumsum(generator.integers(0, 2, size=n)) for n in lengths]
    mask = generator.random(total) < 0.6
    return Batch(
        lengths=lengths,
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        rewards=torch.from_numpy(generator.normal(size=total)),
        values=torch.from_numpy(generator.normal(size=total)),
        log_importance=torch.from_numpy(generator.normal(size=total)),
        kl=torch.from_numpy(generator.normal(size=total)),
        turn_ids=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *turns])),
        action_mask=torch.from_numpy(mask),
        bootstrap_values=torch.from_numpy(generator.normal(size=len(lengths))),
    )


def sequences(batch: Batch):
    """Yield the tokens of each sequence and the value after it."""
    for s in range(len(batch.lengths)):
        yield (batch.sequence_ids == s).nonzero().flatten(), batch.bootstrap_values[s].item()


def assert_close(actual: Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


# Each with two options away from their defaults, bootstrapped values among them.
ALL = {
    "gae": lambda b: gae(b.rewards, b.values, b.sequence_ids, gamma=0.9, lam=0.8),
    "turn_level_gae": lambda b: turn_level_gae(
        b.rewards, b.values, b.sequence_ids, b.turn_ids, gamma=0.9, lam=0.8
    ),
    "skip_observation_gae": lambda b: skip_observation_gae(
        b.rewards * b.action_mask, b.values, b.sequence_ids, b.action_mask, gamma=0.9, lam=0.8
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


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, st.booleans(), st.booleans())
def test_gae_equals_the_literal_formula(lengths, seed, gamma, own_lams, bootstrap):
    b = random_batch(lengths, seed)
    lams = torch.from_numpy(np.random.default_rng(seed).random(sum(lengths)))
    result = gae(
        b.rewards,
        b.values,
        b.sequence_ids,
        gamma=gamma,
        lam=lams if own_lams else 0.7,
        bootstrap_values=b.bootstrap_values if bootstrap else None,
    )
    for tokens, after in sequences(b):
        advantages, targets = literal.gae(
            b.rewards[tokens].tolist(),
            [*b.values[tokens].tolist(), after if bootstrap else 0.0],
            gamma,
            lams[tokens].tolist() if own_lams else [0.7] * len(tokens),
        )
        assert_close(result.advantages[tokens], advantages)
        assert_close(result.targets[tokens], targets)


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS)
def test_turn_level_gae_equals_the_literal_formula(lengths, seed, gamma, lam):
    b = random_batch(lengths, seed)
    result = turn_level_gae(
        b.rewards,
        b.values,
        b.sequence_ids,
        b.turn_ids,
        gamma=gamma,
        lam=lam,
        bootstrap_values=b.bootstrap_values,
    )
    for tokens, after in sequences(b):
        turns = b.turn_ids[tokens]
        advantages, targets = literal.turn_level_gae(
            b.rewards[tokens].tolist(),
            [*b.values[tokens].tolist(), after],
            (turns - turns[:1]).tolist(),
            gamma,
            lam,
        )
        assert_close(result.advantages[tokens], advantages)
        assert_close(result.targets[tokens], targets)


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, DISCOUNTS)
def test_skip_observation_gae_equals_the_literal_formula(lengths, seed, gamma, lam):
    b = random_batch(lengths, seed)
    result = skip_observation_gae(
        b.rewards * b.action_mask,
        b.values,
        b.sequence_ids,
        b.action_mask,
        gamma=gamma,
        lam=lam,
        bootstrap_values=b.bootstrap_values,
    )
    for tokens, after in sequences(b):
        actions: list[list[int]] = []
        for t in tokens.tolist():
            if b.action_mask[t]:
                if t == tokens[0] or not b.action_mask[t - 1]:
                    actions.append([])
                actions[-1].append(t)
        expected = literal.skip_observation_gae(
            [b.rewards[action].tolist() for action in actions],
            [b.values[action].tolist() for action in actions],
            after,
            gamma,
            lam,
        )
        for action, of_action in zip(actions, expected, strict=True):
            assert_close(result.advantages[action], of_action)
            assert_close(
                result.targets[action],
                [a + v for a, v in zip(of_action, b.values[action].tolist(), strict=True)],
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
@given(LENGTHS, SEEDS, DISCOUNTS)
def test_reinforce_plus_plus_returns_equal_the_literal_formula(lengths, seed, gamma):
    b = random_batch(lengths, seed)
    result = reinforce_plus_plus_returns(b.rewards, b.kl, b.sequence_ids, beta=0.3, gamma=gamma)
    for tokens, _ in sequences(b):
        rewards, kl = b.rewards[tokens].tolist(), b.kl[tokens].tolist()
        expected = literal.reinforce_plus_plus_returns(rewards, kl, 0.3, gamma)
        assert_close(result[tokens], expected)


def test_reinforce_plus_plus_return_is_the_final_reward_less_the_divergence_to_go():
    kl = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    rewards = torch.tensor([0.0, 0.0, 2.0])
    result = reinforce_plus_plus_returns(rewards, kl, torch.zeros(3, dtype=torch.int64), beta=0.1)
    assert_close(result, [2 - 0.125, 2 - 0.075, 2 - 0.1])


@PROPERTY
@given(LENGTHS, SEEDS)
def test_gae_with_lambda_one_is_the_return_less_the_value_and_with_zero_the_td_error(lengths, seed):
    b = random_batch(lengths, seed)
    one = gae(b.rewards, b.values, b.sequence_ids, lam=1.0)
    zero = gae(b.rewards, b.values, b.sequence_ids, lam=0.0)
    for tokens, _ in sequences(b):
        rewards, values = b.rewards[tokens], b.values[tokens]
        to_go = rewards.flip(0).cumsum(0).flip(0)
        assert_close(one.targets[tokens], to_go.tolist())
        assert_close(one.advantages[tokens], (to_go - values).tolist())
        td = rewards + torch.cat([values[1:], values.new_zeros(min(len(tokens), 1))]) - values
        assert_close(zero.advantages[tokens], td.tolist())


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


@PROPERTY
@given(LENGTHS, SEEDS, DISCOUNTS, st.booleans())
def test_skipping_observations_is_gae_on_the_action_tokens_alone(lengths, seed, gamma, own_lams):
    b = random_batch(lengths, seed)
    lams = torch.from_numpy(np.random.default_rng(seed).random(sum(lengths)))
    result = skip_observation_gae(
        b.rewards * b.action_mask,
        b.values,
        b.sequence_ids,
        b.action_mask,
        gamma=gamma,
        lam=lams if own_lams else 0.9,
        bootstrap_values=b.bootstrap_values,
    )
    alone = b.select(b.action_mask)
    expected = gae(
        alone.rewards,
        alone.values,
        alone.sequence_ids,
        gamma=gamma,
        lam=lams[b.action_mask] if own_lams else 0.9,
        bootstrap_values=b.bootstrap_values,
    )
    assert_close(result.advantages[b.action_mask], expected.advantages.tolist())
    assert_close(result.targets[b.action_mask], expected.targets.tolist())


def test_observations_get_no_advantage_and_their_values_have_no_effect():
    b = random_batch([9, 6], 1)
    observations = ~b.action_mask
    assert 0 < observations.sum() < 15
    arguments = (b.rewards * b.action_mask, b.values, b.sequence_ids, b.action_mask)
    result = skip_observation_gae(*arguments)
    assert (result.advantages[observations] == 0).all()
    assert torch.equal(result.targets[observations], b.values[observations])
    other = torch.where(observations, 1e9, b.values)
    changed = skip_observation_gae(b.rewards * b.action_mask, other, *arguments[2:])
    assert torch.equal(changed.advantages, result.advantages)


def test_a_reward_at_an_observation_is_one_for_the_action_token_before_it():
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 0])
    at_observations = torch.tensor([0.0, 2.0, 0.0, 3.0, 0.0, 0.0, 5.0])
    at_actions = torch.tensor([2.0, 0.0, 3.0, 0.0, 0.0, 5.0, 0.0])
    values = torch.linspace(-1, 1, 7)
    result = skip_observation_gae(at_observations, values, ids, mask, gamma=0.5)
    expected = skip_observation_gae(at_actions, values, ids, mask, gamma=0.5)
    assert torch.equal(result.advantages, expected.advantages)
    assert result.advantages[5] == 5 - values[5]


@pytest.mark.parametrize("mask", [[1, 0, 0, 1], [0, 0, 0, 0]])
def test_a_reward_before_the_first_action_is_refused(mask):
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="before the first action"):
        skip_observation_gae(
            rewards, torch.zeros(4), torch.tensor([0, 0, 1, 1]), torch.tensor(mask)
        )


def test_all_tokens_of_a_turn_share_its_advantage():
    b = random_batch([8, 8, 8], 2)
    result = turn_level_gae(b.rewards, b.values, b.sequence_ids, b.turn_ids)
    turn = turn_starts(b.sequence_ids, b.turn_ids).cumsum(0)
    assert 3 < int(turn[-1]) < 24
    for i in range(1, int(turn[-1]) + 1):
        assert len(set(result.advantages[turn == i].tolist())) == 1
        assert len(set(result.targets[turn == i].tolist())) == 1


def test_a_new_turn_starts_with_every_sequence_even_if_its_number_goes_on():
    starts = turn_starts(torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 1, 1]))
    assert starts.tolist() == [True, False, True, True, False, True]


@PROPERTY
@given(LENGTHS, SEEDS)
def test_with_turns_of_one_token_turn_level_gae_is_that_of_tokens(lengths, seed):
    b = random_batch(lengths, seed)
    turns = torch.arange(sum(lengths))
    result = turn_level_gae(b.rewards, b.values, b.sequence_ids, turns, gamma=0.9, lam=0.8)
    expected = gae(b.rewards, b.values, b.sequence_ids, gamma=0.9, lam=0.8)
    assert_close(result.advantages, expected.advantages.tolist())
    assert_close(result.targets, expected.targets.tolist())


@PROPERTY
@given(LENGTHS, st.floats(0.01, 2))
def test_length_adaptive_lambdas_equal_the_formula(lengths, alpha):
    ids = random_batch(lengths, 0).sequence_ids
    result = length_adaptive_lambdas(ids, len(lengths), alpha=alpha)
    expected = [min(max(1 - 1 / (alpha * n), 0), 1) for n in lengths for _ in range(n)]
    assert_close(result, expected)


def test_length_adaptive_lambda_is_zero_for_short_sequences_and_near_one_for_long_ones():
    lengths = [20, 40, 20_000]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    result = length_adaptive_lambdas(ids, 3)
    assert result[[0, 20, 60]].tolist() == pytest.approx([0, 0.5, 0.999], abs=1e-12)
    with pytest.raises(ValueError, match="alpha"):
        length_adaptive_lambdas(ids, 3, alpha=0.0)


def test_adaptive_lambdas_keep_the_precision_of_the_values():
    b = random_batch([30, 50], 0)
    lams = length_adaptive_lambdas(b.sequence_ids, 2)
    result = gae(b.rewards.float(), b.values.float(), b.sequence_ids, lam=lams)
    assert result.advantages.dtype == torch.float32
    exact = gae(b.rewards, b.values, b.sequence_ids, lam=lams)
    torch.testing.assert_close(result.advantages.double(), exact.advantages, rtol=0, atol=1e-4)


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
    b = replace(b, bootstrap_values=torch.zeros(2), action_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="next to each other"):
        function(b)


@EVERY
def test_unequal_shapes_are_refused(function):
    b = random_batch([3], 7)
    with pytest.raises(ValueError, match="one shape"):
        function(replace(b, sequence_ids=torch.zeros(4, dtype=torch.int64)))


def test_a_trace_cap_above_that_of_errors_is_refused():
    b = random_batch([3], 8)
    with pytest.raises(ValueError, match=r"c_cap 2.0 is above rho_cap 1.0"):
        vtrace(b.rewards, b.values, b.sequence_ids, b.log_importance, c_cap=2.0)


def test_long_sequences_do_not_lose_precision():
    """A reward of 1 at the end of 20,000 tokens and a value of 0.5 throughout."""
    rewards = torch.zeros(20_000)
    rewards[-1] = 1.0
    ids = torch.zeros(20_000, dtype=torch.int64)
    result = gae(rewards, torch.full((20_000,), 0.5), ids, lam=1.0)
    assert result.advantages.tolist() == [0.5] * 20_000
    assert result.targets.tolist() == [1.0] * 20_000
