"""Returns against double loops over one sequence at a time, and against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.algorithms.returns import (
    gae,
    length_adaptive_lambdas,
    reinforce_plus_plus_returns,
    turn_level_gae,
    turn_starts,
)
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
def test_gae_on_the_sampled_tokens_alone_skips_observations_as_the_literal_formula_does(
    lengths, seed, gamma, lam
):
    b = random_batch(lengths, seed)
    sampled = b.select(b.action_mask)
    result = gae(
        sampled.rewards,
        sampled.values,
        sampled.sequence_ids,
        gamma=gamma,
        lam=lam,
        bootstrap_values=b.bootstrap_values,
    )
    place = b.action_mask.cumsum(0) - 1
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
            assert_close(result.advantages[place[action]], of_action)
            targets = [a + v for a, v in zip(of_action, b.values[action].tolist(), strict=True)]
            assert_close(result.targets[place[action]], targets)


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


def test_long_sequences_do_not_lose_precision():
    """A reward of 1 at the end of 20,000 tokens and a value of 0.5 throughout."""
    rewards = torch.zeros(20_000)
    rewards[-1] = 1.0
    ids = torch.zeros(20_000, dtype=torch.int64)
    result = gae(rewards, torch.full((20_000,), 0.5), ids, lam=1.0)
    assert result.advantages.tolist() == [0.5] * 20_000
    assert result.targets.tolist() == [1.0] * 20_000
