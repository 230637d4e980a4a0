"""Advantages against their formulas, and where these say nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms import advantages
from skyrl_async.algorithms.advantages import (
    BATCH_ESTIMATORS,
    GROUP_ESTIMATORS,
    estimate,
    global_baseline,
    grpo,
    max_rl,
    mean_centered,
    optimal_off_policy_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
)
from tests.algorithms import literal_advantages as literal

PROPERTY = settings(deadline=None)
LARGEST = np.finfo(np.float64).max
REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)
ANY_REWARDS = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=12)
ALL_NAMES = sorted([*GROUP_ESTIMATORS, *BATCH_ESTIMATORS])
# Not of the groups: every other estimator centers by group.
IGNORING_GROUPS = {"reinforce_plus_plus", "global_baseline"}


def random_batch(seed, *, num_groups=5):
    """Groups of 2 to 6 trajectories, their members scattered over the batch."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 7, size=num_groups)
    ids = generator.permutation(np.repeat(np.arange(num_groups) * 7 - 3, sizes))
    return generator.uniform(0, 3, size=len(ids)), ids


@PROPERTY
@given(REWARDS)
def test_mean_centered_equals_the_literal_formula(rewards):
    expected = literal.mean_centered(rewards)
    assert mean_centered(np.array(rewards)) == pytest.approx(expected, abs=1e-10)


@PROPERTY
@given(REWARDS)
def test_grpo_equals_the_literal_formula(rewards):
    # Rounding of the mean, 1e-15, is divided by a standard deviation of at least 1e-6.
    assert grpo(np.array(rewards)) == pytest.approx(literal.grpo(rewards), abs=1e-8)


@PROPERTY
@given(REWARDS)
def test_rloo_equals_the_literal_formula(rewards):
    assert rloo(np.array(rewards)) == pytest.approx(literal.rloo(rewards), abs=1e-10)


@PROPERTY
@given(st.lists(st.floats(0, 10), min_size=2, max_size=16).filter(lambda r: sum(r) > 1e-3))
def test_max_rl_equals_the_literal_formula(rewards):
    assert max_rl(np.array(rewards)) == pytest.approx(literal.max_rl(rewards), abs=1e-10)


@pytest.mark.parametrize("name", sorted(GROUP_ESTIMATORS))
@pytest.mark.parametrize("seed", range(10))
def test_group_estimators_are_applied_to_each_group(name, seed):
    rewards, ids = random_batch(seed)
    result = estimate(name, rewards, ids)
    for group in set(ids):
        expected = getattr(literal, name)(rewards[ids == group].tolist())
        assert result[ids == group] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", sorted(BATCH_ESTIMATORS))
@pytest.mark.parametrize("seed", range(10))
def test_batch_estimators_equal_their_literal_formulas(name, seed):
    rewards, ids = random_batch(seed)
    expected = getattr(literal, name)(rewards.tolist(), ids.tolist())
    assert estimate(name, rewards, ids) == pytest.approx(expected, abs=1e-10)
    assert getattr(advantages, name)(rewards, ids) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_optimal_baseline_equals_the_literal_formula(seed):
    generator = np.random.default_rng(seed)
    rewards, norms = generator.normal(size=8), generator.uniform(0, 5, size=8)
    weights = np.exp(generator.normal(size=8))
    weights[2], norms[5] = 0.0, 0.0
    result = optimal_off_policy_baseline(rewards, weights, norms)
    expected = literal.optimal_off_policy_baseline(*(x.tolist() for x in (rewards, weights, norms)))
    assert result == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_constant_baseline_has_less_variance(seed):
    """Second moment of sum w (R - b) grad log pi over draws of one trajectory, against a grid."""
    generator = np.random.default_rng(seed)
    rewards, weights = generator.normal(size=6), np.exp(generator.normal(size=6))
    gradients = generator.normal(size=(6, 3))
    norms = (gradients**2).sum(axis=1)

    def second_moment(baseline):
        return float(np.sum(weights**2 * (rewards - baseline) ** 2 * norms))

    found = rewards[0] - optimal_off_policy_baseline(rewards, weights, norms)[0]
    for other in found + np.linspace(-1, 1, 41):
        assert second_moment(found) <= second_moment(other) + 1e-12


def test_optimal_baseline_of_equal_weights_and_norms_is_the_mean():
    rewards = np.array([1.0, 0.0, 0.0, 4.0])
    result = optimal_off_policy_baseline(rewards, np.full(4, 3.0), np.full(4, 0.1))
    assert result == pytest.approx(mean_centered(rewards), abs=1e-12)


def test_optimal_baseline_depends_on_relative_weights_only_however_large():
    rewards = np.array([1.0, 0.0, 3.0])
    weights, norms = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.25, 1.0])
    expected = optimal_off_policy_baseline(rewards, weights, norms)
    for scale in (1e-300, 1e300):
        scaled = optimal_off_policy_baseline(rewards, weights * scale, norms * scale)
        assert scaled == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("weights", "norms"), [([0, 0, 0], [1, 1, 1]), ([1, 1, 1], [0, 0, 0]), ([1, 0, 0], [0, 1, 1])]
)
def test_optimal_baseline_without_any_weight_gives_zeros(weights, norms):
    result = optimal_off_policy_baseline(np.array([1.0, 0, 2]), np.array(weights), np.array(norms))
    assert result.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, np.nan], [1.0, np.inf]])
def test_optimal_baseline_refuses_weights_and_norms_that_are_none(bad):
    good = np.ones(2)
    with pytest.raises(ValueError, match="finite and not negative"):
        optimal_off_policy_baseline(good, np.array(bad), good)
    with pytest.raises(ValueError, match="finite and not negative"):
        optimal_off_policy_baseline(good, good, np.array(bad))
    with pytest.raises(ValueError, match="shapes differ"):
        optimal_off_policy_baseline(good, np.ones(3), good)


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3, 1e20, LARGEST, 5e-324])
def test_equal_rewards_give_zeros(name, value):
    result = estimate(name, np.full(7, value), [0, 0, 0, 1, 1, 1, 1])
    assert result.tolist() == [0.0] * 7


def test_equal_rewards_give_zero_and_no_nan():
    assert grpo(np.ones(8)).tolist() == [0.0] * 8
    assert mean_centered(np.zeros(8)).tolist() == [0.0] * 8


@pytest.mark.parametrize("name", sorted(set(ALL_NAMES) - IGNORING_GROUPS))
def test_a_group_of_equal_rewards_gets_zeros_beside_groups_that_differ(name):
    result = estimate(name, [0.1, 0.1, 0.1, 0.0, 1.0], [4, 4, 4, 9, 9])
    assert result[:3].tolist() == [0.0, 0.0, 0.0]
    assert result[3] < 0 < result[4]


@pytest.mark.parametrize("name", sorted(set(ALL_NAMES) - IGNORING_GROUPS))
def test_singletons_get_zero_where_groups_are_the_baseline(name):
    assert estimate(name, [3.0, -1.0, 0.5], [0, 1, 2]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", sorted(IGNORING_GROUPS))
def test_singletons_are_compared_with_the_batch_where_groups_have_no_part(name):
    rewards = [3.0, -1.0, 0.5]
    result = estimate(name, rewards, [0, 1, 2])
    assert result == pytest.approx(estimate(name, rewards, [0, 0, 0]), abs=0)
    assert np.argsort(result).tolist() == [1, 2, 0]
    assert result.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_batch_of_one_gets_zero_and_an_empty_one_nothing(name):
    assert estimate(name, [2.0], [0]).tolist() == [0.0]
    assert estimate(name, [], []).shape == (0,)


def test_max_rl_of_binary_rewards_weighs_successes_by_the_inverse_pass_rate():
    assert max_rl(np.array([1.0, 0, 0, 0])).tolist() == [3.0, -1.0, -1.0, -1.0]
    assert max_rl(np.array([0.0, 0, 0, 0])).tolist() == [0.0] * 4
    assert max_rl(np.array([-3.0, 1.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ALL_NAMES)
@PROPERTY
@given(rewards=ANY_REWARDS, seed=st.integers(0, 2**32 - 1))
def test_every_finite_reward_gives_a_finite_advantage(name, rewards, seed):
    ids = np.random.default_rng(seed).integers(0, 4, size=len(rewards))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        result = estimate(name, rewards, ids)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("name", ["grpo", "batch_normalized", "reinforce_plus_plus"])
def test_huge_rewards_are_normalized_like_small_ones(name):
    rewards, ids = np.array([0.0, 1.0, 1.0, -1.0, 0.5, 0.0]), [0, 0, 0, 1, 1, 1]
    # At these sizes the epsilon beside the standard deviation no longer counts.
    expected = estimate(name, rewards * 1e12, ids)
    assert estimate(name, rewards * 1.7e308, ids) == pytest.approx(expected, abs=1e-10)


def test_small_differences_survive_beside_huge_equal_rewards():
    result = estimate("batch_normalized", [1e300, 1e300, 1.0, -1.0], [0, 0, 1, 1])
    assert result == pytest.approx([0, 0, 2**0.5, -(2**0.5)], abs=1e-5)


def test_what_would_overflow_stays_at_the_largest_float():
    rewards = np.array([LARGEST, -LARGEST, -LARGEST, -LARGEST])
    assert mean_centered(rewards)[0] == LARGEST
    assert rloo(rewards)[0] == LARGEST
    assert max_rl(np.array([1.0, -1.0, 1e-310]))[:2].tolist() == [LARGEST, -LARGEST]


@pytest.mark.parametrize("name", ALL_NAMES)
@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_order_and_labels_do_not_matter(name, seed):
    rewards, ids = random_batch(seed)
    result = estimate(name, rewards, ids)
    order = np.random.default_rng(seed).permutation(len(rewards))
    assert estimate(name, rewards[order], ids[order]) == pytest.approx(result[order], abs=1e-10)
    labels = np.array([f"task-{i}" for i in ids])
    assert estimate(name, rewards, labels).tolist() == result.tolist()


@pytest.mark.parametrize("name", sorted(GROUP_ESTIMATORS))
@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_group_estimators_do_not_depend_on_the_rest_of_the_batch(name, seed):
    rewards, ids = random_batch(seed)
    half = ids > np.median(ids)
    whole = estimate(name, rewards, ids)
    for part in (half, ~half):
        assert estimate(name, rewards[part], ids[part]).tolist() == whole[part].tolist()


@pytest.mark.parametrize("name", sorted(set(ALL_NAMES) - {"max_rl"}))
@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-5, 5))
def test_adding_a_constant_changes_nothing(name, seed, shift):
    rewards, ids = random_batch(seed)
    assert estimate(name, rewards + shift, ids) == pytest.approx(
        estimate(name, rewards, ids), abs=1e-8
    )


@pytest.mark.parametrize("name", ALL_NAMES)
@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_advantages_sum_to_zero(name, seed):
    rewards, ids = random_batch(seed)
    result = estimate(name, rewards, ids)
    assert result.sum() == pytest.approx(0, abs=1e-9)
    if name not in IGNORING_GROUPS:
        for group in set(ids):
            assert result[ids == group].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", sorted(set(BATCH_ESTIMATORS) - {"global_baseline"}))
@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_whitened_batches_have_unit_variance(name, seed):
    rewards, ids = random_batch(seed)
    assert estimate(name, rewards, ids).std() == pytest.approx(1, abs=1e-4)


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_whitening_after_the_group_mean_is_batch_normalization(seed):
    rewards, ids = random_batch(seed)
    expected = estimate("batch_normalized", rewards, ids)
    assert reinforce_plus_plus_baseline(rewards, ids) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_rewards_are_left_as_they_were(name):
    rewards, ids = random_batch(0)
    before = rewards.copy()
    estimate(name, rewards, ids)
    assert rewards.tolist() == before.tolist()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_results_are_float64_of_whatever_rewards(name):
    for rewards in (np.array([0, 1, 1], dtype=np.int64), np.array([0, 1, 1], dtype=np.float32)):
        assert estimate(name, rewards, [0, 0, 0]).dtype == np.float64


def test_unknown_names_and_ill_formed_batches_are_refused():
    with pytest.raises(ValueError, match=r"'gae'.*grpo"):
        estimate("gae", [1.0], [0])
    with pytest.raises(ValueError, match="one shape"):
        estimate("grpo", [1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one shape"):
        estimate("grpo", [[1.0, 2.0]], [[0, 0]])
    with pytest.raises(ValueError, match="finite"):
        estimate("grpo", [1.0, np.nan], [0, 0])
    for function in (reinforce_plus_plus, reinforce_plus_plus_baseline, global_baseline):
        with pytest.raises(ValueError, match="one shape"):
            function(np.ones(2), np.zeros(3))


def test_the_tables_of_estimators_cannot_be_changed():
    for table in (GROUP_ESTIMATORS, BATCH_ESTIMATORS):
        with pytest.raises(TypeError):
            table["mine"] = grpo  # type: ignore[index]
