"""Token-level losses against their formulas, and what their trust regions do."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings

from skyrl_async.algorithms.behavior_losses import (
    aipo,
    double_sided,
    dppo_kl,
    dppo_tv,
    ppo_behavior,
    reinforce_is,
    topr_token,
)
from skyrl_async.algorithms.policy_losses import (
    cispo,
    dual_clip,
    kimi_squared_log,
    ppo_clip,
    reinforce,
    sapo,
)
from tests.algorithms import literal_losses as literal
from tests.algorithms.literal_losses import (
    BATCH,
    gradients,
    literal_gradients,
    literal_values,
    loss_tokens,
)

# Without options of ours, the literal options are the defaults of the papers.
CASES = [
    (ppo_clip, {}, literal.ppo_clip, {"low": 0.2, "high": 0.28}),
    (ppo_clip, {"clip_low": 0.5, "clip_high": 1.0}, literal.ppo_clip, {"low": 0.5, "high": 1.0}),
    (dual_clip, {}, literal.dual_clip, {"low": 0.2, "high": 0.28, "c": 3.0}),
    (
        dual_clip,
        {"clip_low": 0.1, "clip_high": 2.0, "negative_cap": 1.5},
        literal.dual_clip,
        {"low": 0.1, "high": 2.0, "c": 1.5},
    ),
    (cispo, {}, literal.cispo, {"lowest": 0.0, "highest": 5.0}),
    (
        cispo,
        {"clip_low": 0.2, "clip_high": 0.28},
        literal.cispo,
        {"lowest": 0.8, "highest": 1.28},
    ),
    (sapo, {}, literal.sapo, {"tau_pos": 1.0, "tau_neg": 1.05}),
    (
        sapo,
        {"tau_positive": 0.5, "tau_negative": 3.0},
        literal.sapo,
        {"tau_pos": 0.5, "tau_neg": 3.0},
    ),
    (reinforce, {}, literal.reinforce, {}),
    (kimi_squared_log, {}, literal.kimi_squared_log, {"b": 0.1}),
    (kimi_squared_log, {"penalty": 2.0}, literal.kimi_squared_log, {"b": 2.0}),
    (ppo_behavior, {}, literal.ppo_behavior, {"low": 0.2, "high": 0.28}),
    (reinforce_is, {}, literal.reinforce_is, {"cap": 2.0}),
    (reinforce_is, {"cap": math.inf}, literal.reinforce_is, {"cap": math.inf}),
    (aipo, {}, literal.reinforce_is, {"cap": 10.0}),
    (dppo_tv, {}, literal.dppo_tv, {"low": 0.2, "high": 0.2}),
    (dppo_tv, {"delta_low": 0.01, "delta_high": 0.5}, literal.dppo_tv, {"low": 0.01, "high": 0.5}),
    (dppo_kl, {}, literal.dppo_kl, {"low": 0.05, "high": 0.05}),
    (dppo_kl, {"delta_low": 0.01, "delta_high": 0.5}, literal.dppo_kl, {"low": 0.01, "high": 0.5}),
    (double_sided, {}, literal.double_sided, {"low": 0.8, "high": 3.0}),
    (
        double_sided,
        {"clip_low": 0.3, "clip_high": 5.0},
        literal.double_sided,
        {"low": 0.3, "high": 5.0},
    ),
    (topr_token, {}, literal.topr_token, {}),
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


def one_token(ratio: float, advantage: float):
    """A token of this ratio to the proximal and to the behavior policy."""
    return loss_tokens([[(-3.0 + math.log(ratio), -3.0, -3.0, advantage)]])


@pytest.mark.parametrize("loss", [ppo_clip, ppo_behavior])
@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.3, 1.0, True),
        (1.3, -1.0, False),
        (0.7, 1.0, False),
        (0.7, -1.0, True),
        (1.25, 1.0, False),
        (0.85, -1.0, False),
        (50.0, 0.0, False),
    ],
)
def test_ppo_clips_tokens_that_moved_further_than_their_advantage_asks(
    loss, ratio, advantage, clipped
):
    assert loss(one_token(ratio, advantage)).clipped.tolist() == [clipped]


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "value"),
    [(3.5, -1.0, True, 3.0), (2.5, -1.0, False, 2.5), (3.5, 1.0, True, -1.28)],
)
def test_dual_clip_ends_where_a_bad_token_became_too_likely(ratio, advantage, clipped, value):
    result = dual_clip(one_token(ratio, advantage))
    assert result.clipped.tolist() == [clipped]
    assert result.loss.tolist() == pytest.approx([value])


def test_cispo_without_a_lower_bound_keeps_small_ratios_and_bounds_large_ones():
    for ratio, weight in ((0.01, 0.01), (4.0, 4.0), (80.0, 5.0)):
        tokens = one_token(ratio, 1.0)
        result = cispo(tokens)
        assert gradients(result, tokens) == pytest.approx([-weight])
        assert not result.clipped.any()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapo_has_its_steepest_slope_at_ratio_one_for_every_temperature(advantage):
    for tau in (0.3, 1.0, 7.0):
        slopes = {}
        for ratio in (0.2, 1.0, 3.0):
            tokens = one_token(ratio, advantage)
            result = sapo(tokens, tau_positive=tau, tau_negative=tau)
            # The slope by the ratio: by the logprob, divided by the ratio.
            slopes[ratio] = gradients(result, tokens)[0] / ratio
        assert slopes[1.0] == pytest.approx(-advantage)
        assert abs(slopes[0.2]) < abs(slopes[1.0]) > abs(slopes[3.0])


def test_the_squared_log_penalty_pulls_back_from_both_sides():
    for ratio in (0.5, 2.0):
        tokens = one_token(ratio, 0.0)
        (gradient,) = gradients(kimi_squared_log(tokens, penalty=2.0), tokens)
        assert gradient == pytest.approx(2.0 * math.log(ratio))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (ppo_clip, {"clip_low": 1.5}, r"clip_low must be in 0 .. 1, got 1.5"),
        (ppo_clip, {"clip_high": -0.1}, r"clip_high must be at least 0, got -0.1"),
        (ppo_clip, {"clip_high": math.nan}, r"clip_high must be at least 0, got nan"),
        (ppo_behavior, {"clip_low": -0.2}, r"clip_low must be in 0 .. 1, got -0.2"),
        (dual_clip, {"negative_cap": 1.0}, r"negative_cap must be above 1, got 1.0"),
        (dual_clip, {"clip_low": 2.0}, r"clip_low must be in 0 .. 1, got 2.0"),
        (cispo, {"clip_low": 3.0}, r"clip_low must be in 0 .. 1, got 3.0"),
        (cispo, {"clip_high": -1.0}, r"clip_high must be at least 0, got -1.0"),
        (sapo, {"tau_positive": 0.0}, r"tau_positive must be above 0, got 0.0"),
        (sapo, {"tau_negative": -1.0}, r"tau_negative must be above 0, got -1.0"),
        (kimi_squared_log, {"penalty": -0.1}, r"penalty must be at least 0, got -0.1"),
        (reinforce_is, {"cap": 0.5}, r"cap must be at least 1, got 0.5"),
        (aipo, {"cap": 0.5}, r"cap must be at least 1, got 0.5"),
        (dppo_tv, {"delta_low": 1.2}, r"delta_low must be in 0 .. 1, got 1.2"),
        (dppo_tv, {"delta_high": -0.1}, r"delta_high must be in 0 .. 1, got -0.1"),
        (dppo_kl, {"delta_low": -1.0}, r"delta_low must be at least 0, got -1.0"),
        (double_sided, {"clip_low": 3.0}, r"clip_low must be in 0 .. 1, got 3.0"),
    ],
)
def test_options_that_would_silently_train_nonsense_are_refused(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(one_token(1.0, 1.0), **options)


def test_losses_keep_the_number_format_of_the_logprobs():
    tokens = loss_tokens([[(-1.0, -2.0, -3.0, 1.0)]], dtype=torch.float32)
    for loss in {case[0] for case in CASES}:
        assert loss(tokens).loss.dtype == torch.float32, loss.__name__
