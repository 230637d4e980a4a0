"""Weights and masks against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.corrections import (
    finite_mask,
    geometric_mask,
    geometric_weights,
    k2_mask,
    k3_mask,
    normalize_weights,
    opsm_mask,
    sequence_mask,
    sequence_weights,
    token_mask,
    token_weights,
    veto_mask,
)
from tests.algorithms import literal_corrections as literal
from tests.algorithms.correction_batches import LENGTHS, SEEDS, Batch, flat

LEVELS = ["token", "sequence_mean", "sequence_sum", "sequence_max"]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS, st.floats(1.0, 3.0))
def test_weights_equal_the_literal_formulas(lengths, seed, cap):
    batch = Batch(lengths, seed)
    nested = batch.nested(batch.log_ratios)
    for weights, expected in (
        (token_weights(batch.log_ratios, cap=cap), literal.token_weights(nested, cap)),
        (sequence_weights(*batch.sequences(), cap=cap), literal.sequence_weights(nested, cap)),
        (geometric_weights(*batch.sequences(), cap=cap), literal.geometric_weights(nested, cap)),
    ):
        assert weights.tolist() == pytest.approx(flat(expected), rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_ratio_masks_equal_the_literal_formulas(lengths, seed):
    batch = Batch(lengths, seed)
    nested = batch.nested(batch.log_ratios)
    for low, high in ((0.5, 2.0), (0.9, 1.1), (0.0, 1.2), (0.8, math.inf)):
        interval = {"low": low, "high": high}
        for mask, expected in (
            (token_mask(batch.log_ratios, **interval), literal.token_mask(nested, **interval)),
            (
                sequence_mask(*batch.sequences(), **interval),
                literal.sequence_mask(nested, **interval),
            ),
            (
                geometric_mask(*batch.sequences(), **interval),
                literal.geometric_mask(nested, **interval),
            ),
        ):
            assert mask.tolist() == flat(expected), interval
    vetoed = veto_mask(*batch.sequences(), below=0.6)
    assert vetoed.tolist() == flat(literal.veto_mask(nested, 0.6))


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=SEEDS, limit=st.floats(0.005, 0.5))
def test_divergence_masks_equal_the_literal_formulas(level, lengths, seed, limit):
    batch = Batch(lengths, seed)
    nested = batch.nested(batch.log_ratios)
    for kind, function in (("k2", k2_mask), ("k3", k3_mask)):
        mask = function(*batch.sequences(), limit=limit, level=level)
        assert mask.tolist() == flat(literal.divergence_mask(nested, kind, limit, level)), kind


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS, st.floats(0.0, 0.5))
def test_opsm_mask_equals_the_literal_formula(lengths, seed, delta):
    batch = Batch(lengths, seed)
    mask = opsm_mask(
        batch.log_ratios, batch.advantages, batch.ids, batch.num_sequences, delta=delta
    )
    expected = literal.opsm_mask(
        batch.nested(batch.proximal),
        batch.nested(batch.behavior),
        batch.nested(batch.advantages),
        delta,
    )
    assert mask.tolist() == flat(expected)


def test_opsm_rejects_only_bad_sequences_that_the_learner_finds_less_likely_than_the_engine_did():
    # Sequences: bad and less likely; bad and more likely; good and less likely.
    log_ratios = torch.tensor([-0.8, -0.4, 0.8, 0.4, -0.8, -0.4])
    advantages = torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    mask = opsm_mask(log_ratios, advantages, ids, 3, delta=0.5)
    assert mask.tolist() == [False, False, True, True, True, True]
    assert opsm_mask(log_ratios, advantages, ids, 3, delta=0.7).all()


def test_veto_takes_the_whole_sequence_of_one_token_and_no_other():
    log_ratios = torch.tensor([0.0, math.log(1e-5), 0.0, 0.0, math.log(1e-3)])
    mask = veto_mask(log_ratios, torch.tensor([0, 0, 0, 1, 1]), 2, below=1e-4)
    assert mask.tolist() == [False, False, False, True, True]


def test_a_ratio_that_is_no_number_passes_no_mask():
    log_ratios, ids = torch.tensor([math.nan, 0.0, 0.0]), torch.tensor([0, 0, 1])
    given = (log_ratios, ids, 2)
    assert token_mask(log_ratios, low=0.5, high=2.0).tolist() == [False, True, True]
    for mask in (
        veto_mask(*given, below=1e-4),
        sequence_mask(*given, low=0.5, high=2.0),
        geometric_mask(*given, low=0.5, high=2.0),
        k2_mask(*given, limit=0.1, level="sequence_max"),
        k3_mask(*given, limit=0.1, level="sequence_mean"),
    ):
        assert mask.tolist() == [False, False, True]


def test_finite_mask_takes_out_what_cannot_be_a_logprob():
    logprobs = torch.tensor([-1.0, 0.0, math.nan, math.inf, -math.inf, 0.5, -80.0, 1e-6])
    kept = [True, True, False, False, False, False, True, True]
    assert finite_mask(logprobs).tolist() == kept


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=20))
def test_normalized_weights_have_mean_one_and_the_old_proportions(values):
    weights = torch.tensor(values, dtype=torch.float64)
    normalized = normalize_weights(weights)
    if weights.mean() < 1e-300:
        assert normalized.isfinite().all()
        return
    assert normalized.mean().item() == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(normalized * weights.mean(), weights, atol=1e-10, rtol=1e-10)


def test_weights_of_zero_stay_zero_when_normalized():
    assert normalize_weights(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_long_sequences_neither_overflow_nor_underflow():
    log_ratios = torch.tensor([5.0] * 100 + [-5.0] * 100)
    ids = torch.tensor([0] * 100 + [1] * 100)
    weights = sequence_weights(log_ratios, ids, 2, cap=2.0)
    assert weights.tolist() == [2.0] * 100 + [0.0] * 100
    for low, high, expected in ((0.0, 2.0, [0, 1]), (0.5, math.inf, [1, 0]), (0.5, 2.0, [0, 0])):
        mask = sequence_mask(log_ratios, ids, 2, low=low, high=high)
        assert mask[[0, 100]].tolist() == [bool(kept) for kept in expected]
