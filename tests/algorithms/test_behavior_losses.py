"""What the trust regions against the sampling policy do, beyond their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.behavior_losses import (
    double_sided,
    dppo_kl,
    dppo_tv,
    m2_mask,
    m2po,
    topr_token,
)
from tests.algorithms.literal_losses import (
    BATCH,
    gradients,
    literal_gradients,
    literal_values,
    loss_tokens,
    m2_kept,
    random_batch,
)

# Limits that no mean of up to 12 squares of such log ratios comes near: rounding decides nothing.
LOG_RATIOS = st.lists(
    st.tuples(st.integers(-2000, 2000).map(lambda n: n / 1000), st.floats(-3, 3)), max_size=12
)
LIMITS = st.integers(0, 1000).map(lambda n: (n + 0.123456789) / 1000)


def token(probability: float, behavior_probability: float, advantage: float):
    row = (math.log(probability), -9.0, math.log(behavior_probability), advantage)
    return loss_tokens([[row]])


@settings(deadline=None, max_examples=200)
@given(rows=LOG_RATIOS, limit=LIMITS)
def test_m2_mask_drops_what_the_literal_loop_drops(rows, limit):
    log_ratios = [x for x, _ in rows]
    advantages = [a for _, a in rows]
    mask = m2_mask(
        torch.tensor(log_ratios, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        limit=limit,
    ).tolist()
    expected = m2_kept(log_ratios, advantages, limit)
    # Of tokens with the same square, it does not matter which are dropped.
    assert sorted((abs(x), kept) for x, kept in zip(log_ratios, mask, strict=True)) == sorted(
        (abs(x), kept) for x, kept in zip(log_ratios, expected, strict=True)
    )


@pytest.mark.parametrize("limit", [0.0, 1e-3, 0.04, 0.3, 0.9])
@pytest.mark.parametrize("values", ["continuous", "of few sizes"])
@pytest.mark.parametrize("seed", range(3))
def test_m2_mask_of_many_tokens_drops_what_sorting_all_of_them_drops(limit, values, seed):
    generator = torch.Generator().manual_seed(seed)
    log_ratios, advantages = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
    if values == "of few sizes":
        log_ratios = (4 * log_ratios).round() / 4
    outward = advantages * log_ratios.sign() > 0
    squares = log_ratios.square().masked_fill(~outward, torch.inf)
    ascending, order = squares.sort(stable=True)
    within = torch.empty_like(outward)
    within[order] = ascending.cumsum(0) / torch.arange(1, 5001) <= limit
    expected = within | ~outward
    assert (~expected).any()
    assert torch.equal(m2_mask(log_ratios, advantages, limit=limit), expected)


@pytest.mark.parametrize("size", [0.3, 0.7, -2.7])
@pytest.mark.parametrize("equal", [513, 534, 600, 899, 4000])
def test_m2_mask_ends_where_more_tokens_are_equal_than_it_sorts(equal, size):
    """Their mean, rounded, may be below or above every one of them."""
    generator = torch.Generator().manual_seed(0)
    near = 0.05 * torch.randn(200, generator=generator, dtype=torch.float64)
    log_ratios = torch.cat((near, torch.full((equal,), size, dtype=torch.float64)))
    outward = log_ratios.sign()
    ascending = log_ratios.square().sort().values
    within = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1) <= 0.04
    assert m2_mask(log_ratios, outward, limit=0.04).sum() == within.sum() < len(within)
    assert not m2_mask(log_ratios[200:], outward[200:], limit=0.04).any()


def test_m2_mask_bounds_the_second_moment_and_never_drops_tokens_moving_back():
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(400, generator=generator, dtype=torch.float64)
    advantages = torch.randn(400, generator=generator, dtype=torch.float64)
    kept = m2_mask(log_ratios, advantages)
    outward = log_ratios * advantages > 0
    squares = log_ratios**2
    assert squares[outward & kept].mean() <= 0.04
    with_the_next = torch.cat((squares[outward & kept], squares[~kept].min()[None]))
    assert with_the_next.mean() > 0.04
    assert kept[~outward].all()
    assert squares[~kept].min() >= squares[outward & kept].max()


def test_m2_mask_keeps_everything_within_the_limit():
    log_ratios = torch.tensor([0.2, -0.2, 0.1])
    assert m2_mask(log_ratios, torch.tensor([1.0, -1.0, 1.0])).all()


def test_m2_mask_of_a_batch_is_not_that_of_its_parts():
    log_ratios = torch.tensor([0.01, 0.01, 0.01, 0.3])
    advantages = torch.ones(4)
    assert m2_mask(log_ratios, advantages).tolist() == [True] * 4
    assert m2_mask(log_ratios[3:], advantages[3:]).tolist() == [False]


@settings(deadline=None, max_examples=60)
@given(batch=BATCH)
def test_m2po_equals_the_literal_formula_on_its_own_tokens(batch):
    tokens = loss_tokens(batch)
    result = m2po(tokens)
    kept = iter((~result.clipped).tolist())
    expected_kept = m2_kept(
        [row[0] - row[2] for rows in batch for row in rows],
        [row[3] for rows in batch for row in rows],
        0.04,
    )
    assert (~result.clipped).sum().item() == sum(expected_kept)
    masks = {id(rows): [next(kept) for _ in rows] for rows in batch}
    values: list[float] = []
    slopes: list[float] = []
    for rows in batch:
        mask = masks[id(rows)]

        def formula(y, t, mask=mask):
            return -(y[t].w * y[t].advantage * float(mask[t]))

        values += literal_values(formula, [rows])
        slopes += literal_gradients(formula, [rows])
    assert result.loss.tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)
    assert gradients(result, tokens) == pytest.approx(slopes, rel=1e-9, abs=1e-9)


def test_m2po_takes_the_mask_of_a_larger_batch():
    batch = random_batch([3, 4, 2], seed=1)
    whole = loss_tokens(batch)
    kept = m2_mask(
        (whole.current_logprobs - whole.behavior_logprobs).detach(), whole.advantages, limit=0.5
    )
    assert 0 < kept.sum() < 9
    parts = [loss_tokens(batch[:1]), loss_tokens(batch[1:])]
    masked = [m2po(part, kept=k) for part, k in zip(parts, kept.split([3, 6]), strict=True)]
    assert torch.equal(torch.cat([m.loss for m in masked]), m2po(whole, limit=0.5).loss)


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match=r"limit must be at least 0, got -0.1"):
        m2_mask(torch.zeros(1), torch.ones(1), limit=-0.1)
    with pytest.raises(ValueError, match=r"limit must be at least 0, got -0.1"):
        m2po(token(0.5, 0.5, 1.0), limit=-0.1)


@pytest.mark.parametrize("loss", [dppo_tv, dppo_kl])
def test_dppo_lets_rare_tokens_grow_by_a_large_factor_but_not_frequent_ones_by_a_small_one(loss):
    assert not loss(token(1e-3, 1e-5, 1.0)).clipped.any()
    assert loss(token(0.99, 0.7, 1.0)).clipped.all()
    assert loss(token(0.7, 0.99, -1.0)).clipped.all()


@pytest.mark.parametrize("loss", [dppo_tv, dppo_kl])
def test_dppo_keeps_tokens_that_move_back(loss):
    assert not loss(token(0.7, 0.99, 1.0)).clipped.any()
    assert not loss(token(0.99, 0.7, -1.0)).clipped.any()
    assert not loss(token(0.99, 0.7, 0.0)).clipped.any()


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_dppo_kl_knows_how_far_certainty_is_from_doubt(rounding):
    doubt = math.log(0.5)
    certain_now = loss_tokens([[(rounding, 0.0, doubt, 1.0)]])
    assert dppo_kl(certain_now, delta_high=1e6).clipped.all()
    certain_before = loss_tokens([[(doubt, 0.0, rounding, -1.0)]])
    assert dppo_kl(certain_before, delta_low=0.69).clipped.all()
    assert not dppo_kl(certain_before, delta_low=0.7).clipped.any()
    still_certain = loss_tokens([[(rounding, 0.0, 0.0, 1.0), (0.0, 0.0, rounding, -1.0)]])
    assert not dppo_kl(still_certain).clipped.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_double_sided_drops_tokens_outside_whatever_their_advantage(advantage):
    for probability, dropped in ((0.019, True), (0.021, False), (0.39, False), (0.41, True)):
        tokens = token(probability, 0.1, advantage)
        assert double_sided(tokens).clipped.tolist() == [dropped]


def test_topr_token_tapers_only_bad_tokens_that_became_unlikely():
    for probability, advantage, weight in (
        (0.01, 1.0, 1.0),
        (0.5, 1.0, 1.0),
        (0.01, -1.0, 0.1),
        (0.5, -1.0, 1.0),
    ):
        tokens = token(probability, 0.1, advantage)
        assert gradients(topr_token(tokens), tokens) == pytest.approx([-advantage * weight])
