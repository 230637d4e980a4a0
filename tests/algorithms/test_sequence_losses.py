"""Sequence-level losses against their token form and against the objectives of their papers."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings

from skyrl_async.algorithms.sequence_losses import gmpo, gspo, topr, vespo
from tests.algorithms import literal_losses as literal
from tests.algorithms.literal_losses import (
    BATCH,
    gradients,
    literal_gradients,
    literal_values,
    loss_tokens,
    random_batch,
    sequence_of,
)

CASES = [
    (gspo, {}, literal.gspo, {"low": 3e-4, "high": 4e-4}),
    (gspo, {"clip_low": 0.5, "clip_high": 2.0}, literal.gspo, {"low": 0.5, "high": 2.0}),
    (gmpo, {}, literal.gmpo, {"low": 0.4, "high": 0.4}),
    (gmpo, {"clip_low": 0.1, "clip_high": 1.5}, literal.gmpo, {"low": 0.1, "high": 1.5}),
    (vespo, {}, literal.vespo, {"positive": (2.0, 3.0), "negative": (3.0, 2.0)}),
    (
        vespo,
        {
            "k_positive": 0.5,
            "lambda_positive": 1.0,
            "k_negative": 1.0,
            "lambda_negative": 0.2,
        },
        literal.vespo,
        {"positive": (0.5, 1.0), "negative": (1.0, 0.2)},
    ),
    (topr, {}, literal.topr, {}),
]


@pytest.mark.parametrize(("loss", "options", "formula", "constants"), CASES)
@settings(deadline=None, max_examples=60)
@given(batch=BATCH)
def test_values_and_gradients_equal_the_literal_formula(loss, options, formula, constants, batch):
    tokens = loss_tokens(batch)
    result = loss(tokens, **options)
    formula = partial(formula, **constants)
    assert result.loss.tolist() == pytest.approx(literal_values(formula, batch), rel=1e-9, abs=1e-9)
    assert gradients(result, tokens) == pytest.approx(
        literal_gradients(formula, batch), rel=1e-9, abs=1e-9
    )


def one_advantage_per_sequence(batch):
    return [[(c, p, b, rows[0][3]) for c, p, b, _ in rows] for rows in batch]


@pytest.mark.parametrize(
    ("loss", "objective"),
    [
        (partial(gspo, clip_low=0.5, clip_high=2.0), literal.gspo_objective),
        (partial(gmpo, clip_low=0.5, clip_high=2.0), literal.gmpo_objective),
    ],
)
@settings(deadline=None, max_examples=60)
@given(batch=BATCH.map(one_advantage_per_sequence))
def test_the_mean_over_tokens_is_the_objective_of_the_paper_with_its_gradient(
    loss, objective, batch
):
    tokens = loss_tokens(batch)
    means = tokens.means(loss(tokens).loss)
    (slopes,) = torch.autograd.grad(means.sum(), tokens.current_logprobs)
    expected = partial(objective, low=0.5, high=2.0)
    assert means.tolist() == pytest.approx(
        [expected(sequence_of(rows)).value for rows in batch], rel=1e-9, abs=1e-9
    )
    assert slopes.tolist() == pytest.approx(
        [expected(sequence_of(rows, seed=u)).slope for rows in batch for u in range(len(rows))],
        rel=1e-9,
        abs=1e-9,
    )


def test_gspo_clips_sequences_as_one_where_their_tokens_have_one_advantage():
    batch = one_advantage_per_sequence(random_batch([4] * 8, seed=0))
    result = gspo(loss_tokens(batch))
    per_sequence = result.clipped.reshape(8, 4)
    assert (per_sequence.all(1) | ~per_sequence.any(1)).all()
    assert 0 < per_sequence[:, 0].sum() < 8


def test_gmpo_clips_tokens_on_the_outward_side_of_the_log_ratio_only():
    def clipped(log_ratio: float, advantage: float) -> bool:
        row = (-3.0 + log_ratio, -3.0, -3.0, advantage)
        return gmpo(loss_tokens([[row, (-1.0, -1.0, -1.0, advantage)]])).clipped.tolist()[0]

    assert clipped(0.41, 1.0)
    assert clipped(-0.41, -1.0)
    assert not clipped(0.39, 1.0)
    assert not clipped(-2.0, 1.0)
    assert not clipped(2.0, -1.0)


def kernel(log_weight: float, advantage: float) -> float:
    """The kernel at this importance weight of a sequence of two tokens."""
    row = (-3.0 + log_weight / 2, -3.0, -3.0, advantage)
    tokens = loss_tokens([[row, row]])
    return gradients(vespo(tokens), tokens)[0] / -advantage


def test_the_kernel_of_vespo_is_one_on_policy_and_fades_on_both_sides():
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        assert kernel(0.0, advantage) == pytest.approx(1.0)
        highest = kernel(math.log(peak), advantage)
        assert highest > kernel(math.log(peak) + 0.1, advantage)
        assert highest > kernel(math.log(peak) - 0.1, advantage)
        assert kernel(-5.0, advantage) < 1e-3
        assert kernel(5.0, advantage) < 1e-3


def test_vespo_survives_weights_of_long_sequences_beyond_the_number_format():
    for log_ratio in (-0.9, 0.9):
        row = (-2.0 + log_ratio, -2.0, -2.0, 1.0)
        tokens = loss_tokens([[row] * 2000], dtype=torch.float32)
        assert gradients(vespo(tokens), tokens) == [0.0] * 2000


def test_topr_weighs_good_sequences_fully_and_bad_ones_by_their_truncated_ratio():
    for log_ratio, advantage, weight in (
        (-1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (-1.0, -1.0, math.exp(-2.0)),
        (1.0, -1.0, 1.0),
    ):
        row = (-3.0 + log_ratio, -3.0, -3.0, advantage)
        tokens = loss_tokens([[row, row]])
        assert gradients(topr(tokens), tokens) == pytest.approx([-advantage * weight] * 2)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (gspo, {"clip_low": 1.1}, r"clip_low must be in 0 .. 1, got 1.1"),
        (gspo, {"clip_high": -1e-4}, r"clip_high must be at least 0, got -0.0001"),
        (gmpo, {"clip_low": -0.4}, r"clip_low must be at least 0, got -0.4"),
        (gmpo, {"clip_high": -0.4}, r"clip_high must be at least 0, got -0.4"),
        (vespo, {"k_positive": 0.0}, r"k_positive must be above 0, got 0.0"),
        (vespo, {"lambda_negative": -2.0}, r"lambda_negative must be above 0, got -2.0"),
    ],
)
def test_options_that_would_silently_train_nonsense_are_refused(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(loss_tokens(random_batch([2], seed=0)), **options)
