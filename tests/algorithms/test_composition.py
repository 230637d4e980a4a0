"""Corrections composed, and what a rejected token still does: nothing."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings

from skyrl_async.algorithms.aggregation import aggregation_weights
from skyrl_async.algorithms.behavior_losses import m2_mask
from skyrl_async.algorithms.composition import CorrectionSettings, correct
from skyrl_async.algorithms.corrections import (
    finite_mask,
    geometric_weights,
    sequence_weights,
    token_weights,
)
from skyrl_async.algorithms.tokens import LossTokens
from tests.algorithms import literal_corrections as literal
from tests.algorithms.correction_batches import EVERYTHING, LENGTHS, SEEDS, Batch, flat

AGGREGATIONS = ["token_mean", "sequence_mean", "prompt_mean", "constant"]
SINGLE = {
    "token_mask": (0.7, 1.4),
    "sequence_mask": (0.5, 2.0),
    "geometric_mask": (0.9, 1.1),
    "veto_below": 0.5,
    "k2_limit": 0.05,
    "k3_limit": 0.05,
    "opsm_delta": 0.05,
    "m2_limit": 0.02,
}


def aggregated_loss(tokens: LossTokens, weights: torch.Tensor, kind) -> torch.Tensor:
    """A policy gradient loss over the given tokens; two neighboring sequences share a prompt."""
    ratio = (tokens.current_logprobs - tokens.proximal_logprobs).exp()
    losses = -weights * ratio * tokens.advantages
    shares = aggregation_weights(
        tokens.sequence_ids,
        tokens.sequence_ids // 2,
        kind=kind,
        constant_length=5,
        dtype=torch.float64,
    )
    return (shares * losses).sum()


@pytest.mark.parametrize("weight", ["none", "token", "sequence", "geometric"])
def test_on_policy_all_weights_are_one_and_nothing_is_masked(weight):
    batch = Batch([3, 0, 5, 1], seed=0, spread=0.0)
    narrow = CorrectionSettings(
        weight=weight,
        normalize_weights=True,
        token_mask=(0.999, 1.001),
        sequence_mask=(0.999, 1.001),
        geometric_mask=(0.999, 1.001),
        veto_below=0.999,
        k2_limit=1e-9,
        k3_limit=1e-9,
        k_level="sequence_sum",
        opsm_delta=0.0,
        m2_limit=1e-9,
    )
    result = batch.correct(narrow)
    assert result.weights.tolist() == [1.0] * 9
    assert result.mask.all()
    assert result.sums["kl_behavior"].item() == 0
    assert {name: value.item() for name, value in result.sums.items() if "masked" in name} == {
        f"masked_{name}": 0.0
        for name in (
            *("invalid", "token", "sequence", "geometric", "veto", "k2", "k3", "opsm", "m2"),
        )
    }


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_a_token_is_kept_if_every_mask_keeps_it(lengths, seed):
    batch = Batch(lengths, seed)
    nested = batch.nested(batch.log_ratios)
    without_m2 = dataclasses.replace(EVERYTHING, m2_limit=None)
    literal_masks = (
        literal.token_mask(nested, 0.5, 2.0),
        literal.sequence_mask(nested, 0.2, 5.0),
        literal.geometric_mask(nested, 0.7, 1.4),
        literal.veto_mask(nested, 0.3),
        literal.divergence_mask(nested, "k2", 0.2, "sequence_mean"),
        literal.divergence_mask(nested, "k3", 0.2, "sequence_mean"),
        literal.opsm_mask(
            batch.nested(batch.proximal),
            batch.nested(batch.behavior),
            batch.nested(batch.advantages),
            0.02,
        ),
    )
    expected = [all(kept) for kept in zip(*map(flat, literal_masks), strict=True)]
    result = batch.correct(without_m2)
    assert result.mask.tolist() == expected
    for name, mask in zip(
        ("token", "sequence", "geometric", "veto", "k2", "k3", "opsm"), literal_masks, strict=True
    ):
        assert result.sums[f"masked_{name}"].item() == flat(mask).count(False), name
    assert result.sums["kept"].item() == expected.count(True)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_corrected_weights_are_the_literal_ones_of_kept_tokens_over_their_mean(lengths, seed):
    batch = Batch(lengths, seed)
    result = batch.correct(EVERYTHING)
    weights = literal.sequence_weights(batch.nested(batch.log_ratios), 1.5)
    mask = batch.nested(result.mask)
    mean = literal.mean_weight(weights, mask) if result.mask.any() else 1.0
    expected = [
        weight / mean if kept else 0.0
        for weight, kept in zip(flat(weights), flat(mask), strict=True)
    ]
    assert result.weights.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_the_second_moment_is_limited_over_the_tokens_that_the_other_masks_keep(lengths, seed):
    batch = Batch(lengths, seed)
    others = batch.correct(dataclasses.replace(EVERYTHING, m2_limit=None)).mask
    expected = others.clone()
    expected[others] = m2_mask(
        batch.log_ratios[others], batch.advantages[others], limit=EVERYTHING.m2_limit
    )
    result = batch.correct(EVERYTHING)
    assert result.mask.tolist() == expected.tolist()
    assert result.sums["masked_m2"].item() == (others & ~expected).sum().item()


@pytest.mark.parametrize("option", sorted(SINGLE))
def test_each_mask_is_applied_by_its_option_and_counted(option):
    batch = Batch([4, 6, 5, 3, 6, 4], seed=3)
    result = batch.correct(CorrectionSettings(**{option: SINGLE[option]}))
    rejected = int((~result.mask).sum())
    assert 0 < rejected < len(result.mask)
    name = option.removesuffix("_mask").removesuffix("_below").removesuffix("_limit")
    assert result.sums[f"masked_{name.removesuffix('_delta')}"].item() == rejected
    assert result.sums["kept"].item() == len(result.mask) - rejected


def test_without_masks_all_tokens_are_kept_with_the_weight_asked_for():
    batch = Batch([4, 3], seed=1)
    for weight, expected in (
        ("none", torch.ones(7, dtype=torch.float64)),
        ("token", token_weights(batch.log_ratios, cap=1.2)),
        ("sequence", sequence_weights(*batch.sequences(), cap=1.2)),
        ("geometric", geometric_weights(*batch.sequences(), cap=1.2)),
    ):
        result = batch.correct(CorrectionSettings(weight=weight, weight_cap=1.2))
        assert result.weights.tolist() == expected.tolist(), weight
        assert result.mask.all()


def test_sums_describe_the_truncated_weights_of_kept_tokens_before_normalization():
    batch = Batch([2, 2], seed=0)
    batch.log_ratios = torch.tensor([0.0, 1.0, 0.3, 3.0], dtype=torch.float64)
    result = batch.correct(
        CorrectionSettings(weight_cap=2.0, token_mask=(0.5, 10.0), normalize_weights=True)
    )
    assert result.mask.tolist() == [True, True, True, False]
    weights = [1.0, 2.0, math.exp(0.3)]
    assert result.sums["importance_weight"].item() == pytest.approx(sum(weights))
    assert result.sums["importance_weight_squared"].item() == pytest.approx(
        sum(weight**2 for weight in weights)
    )
    assert result.sums["importance_weight_capped"].item() == 1
    assert result.sums["kl_behavior"].item() == pytest.approx(
        sum(math.exp(x) - 1 - x for x in batch.log_ratios.tolist())
    )


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_order_of_sequences_does_not_matter(lengths, seed):
    batch, permuted = Batch(lengths, seed), Batch(lengths, seed)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    index = torch.cat([torch.nonzero(batch.ids == i).flatten() for i in order])
    permuted.log_ratios = batch.log_ratios[index]
    permuted.advantages = batch.advantages[index]
    permuted.ids = torch.arange(len(order)).repeat_interleave(
        torch.tensor([lengths[i] for i in order])
    )
    for correction_settings in (EVERYTHING, CorrectionSettings(weight="geometric")):
        expected, result = (b.correct(correction_settings) for b in (batch, permuted))
        assert result.mask.tolist() == expected.mask[index].tolist()
        assert result.weights.tolist() == pytest.approx(expected.weights[index].tolist())
        for name, value in expected.sums.items():
            assert result.sums[name].item() == pytest.approx(value.item(), abs=1e-10), name


@settings(deadline=None, max_examples=50)
@given(LENGTHS, SEEDS)
def test_sequences_without_tokens_and_invalid_tokens_change_nothing_else(lengths, seed):
    batch, padded = Batch(lengths, seed), Batch(lengths, seed)
    invalid = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    padded.log_ratios = torch.cat([batch.log_ratios, invalid])
    padded.advantages = torch.cat([batch.advantages, torch.tensor([-1.0, 1.0, math.nan])])
    padded.ids = torch.cat([batch.ids, torch.tensor([0, len(lengths), len(lengths) + 2])])
    padded.num_sequences = len(lengths) + 4
    expected, result = batch.correct(EVERYTHING), padded.correct(EVERYTHING)
    num_tokens = len(batch.log_ratios)
    assert result.mask.tolist() == [*expected.mask.tolist(), False, False, False]
    assert result.weights[:num_tokens].tolist() == pytest.approx(expected.weights.tolist())
    assert result.weights[num_tokens:].tolist() == [0.0, 0.0, 0.0]
    assert result.sums.pop("masked_invalid").item() == 3
    for name, value in result.sums.items():
        assert value.item() == pytest.approx(expected.sums[name].item(), abs=1e-10), name


@pytest.mark.parametrize("kind", AGGREGATIONS)
@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS)
def test_masked_tokens_change_neither_value_nor_gradient_nor_denominator(kind, lengths, seed):
    batch = Batch(lengths, seed)
    result = batch.correct(dataclasses.replace(EVERYTHING, k_level="token"))
    current = batch.current.clone().requires_grad_()
    loss = aggregated_loss(
        batch.tokens(current).select(result.mask), result.weights[result.mask], kind
    )
    (gradient,) = torch.autograd.grad(loss, current)

    losses = (-result.weights * (batch.current - batch.proximal).exp() * batch.advantages).tolist()
    expected = literal.aggregate(
        batch.nested(torch.tensor(losses, dtype=torch.float64)),
        [i // 2 for i in range(len(lengths))],
        batch.nested(result.mask),
        kind,
        constant_length=5,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    assert gradient[~result.mask].tolist() == [0.0] * int((~result.mask).sum())

    changed = batch.tokens(torch.where(result.mask, batch.current, 7.0))
    changed = dataclasses.replace(
        changed, advantages=torch.where(result.mask, batch.advantages, math.nan)
    )
    same = aggregated_loss(changed.select(result.mask), result.weights[result.mask], kind)
    assert same.item() == loss.item()


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("invalid", [math.nan, math.inf, -math.inf, 0.25])
def test_invalid_behavior_logprobs_have_no_part_in_loss_gradient_or_denominator(kind, invalid):
    batch, absent = Batch([4, 3, 5, 2], seed=5), Batch([3, 3, 4, 2], seed=5)
    bad = torch.zeros(14, dtype=torch.bool)
    bad[[1, 9]] = True
    for name in ("current", "proximal", "behavior", "advantages", "log_ratios", "ids"):
        setattr(absent, name, getattr(batch, name)[~bad])
    batch.behavior[bad] = invalid
    valid = finite_mask(batch.behavior)
    assert valid.tolist() == (~bad).tolist()
    batch.log_ratios = torch.where(valid, batch.proximal - batch.behavior, math.nan)

    def loss_and_gradient(of: Batch) -> tuple[float, torch.Tensor]:
        result = of.correct(EVERYTHING)
        current = of.current.clone().requires_grad_()
        tokens = of.tokens(current).select(result.mask)
        loss = aggregated_loss(tokens, result.weights[result.mask], kind)
        (gradient,) = torch.autograd.grad(loss, current)
        return loss.item(), gradient

    loss, gradient = loss_and_gradient(batch)
    expected_loss, expected_gradient = loss_and_gradient(absent)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert expected_gradient.abs().max().item() > 0
    assert gradient[bad].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient[~bad], expected_gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("weight", ["none", "token", "sequence", "geometric"])
@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS)
def test_without_masks_and_normalization_parts_of_a_batch_are_corrected_as_the_whole(
    weight, lengths, seed
):
    batch = Batch(lengths, seed)
    alone = CorrectionSettings(weight=weight)
    assert not alone.needs_whole_batch
    whole = batch.correct(alone)
    for parity in (0, 1):
        mine = batch.ids % 2 == parity
        part = correct(
            batch.log_ratios[mine],
            advantages=batch.advantages[mine],
            sequence_ids=batch.ids[mine],
            num_sequences=batch.num_sequences,
            settings=alone,
        )
        assert part.weights.tolist() == pytest.approx(whole.weights[mine].tolist(), rel=1e-12)


@pytest.mark.parametrize("option", ["normalize_weights", *sorted(SINGLE)])
def test_masks_and_normalization_need_the_whole_batch(option):
    value = SINGLE.get(option, True)
    assert CorrectionSettings(**{option: value}).needs_whole_batch
    assert not CorrectionSettings(weight="sequence", weight_cap=5.0).needs_whole_batch


def test_corrections_carry_no_gradient():
    batch = Batch([4, 3], seed=2)
    batch.log_ratios.requires_grad_()
    result = batch.correct(EVERYTHING)
    tensors = (
        result.weights,
        *result.sums.values(),
        token_weights(batch.log_ratios, cap=2.0),
        sequence_weights(*batch.sequences(), cap=2.0),
        geometric_weights(*batch.sequences(), cap=2.0),
    )
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_no_tokens_give_no_weights_and_sums_of_zero(lengths):
    result = Batch(lengths, seed=0).correct(EVERYTHING)
    assert result.weights.shape == result.mask.shape == (0,)
    assert result.mask.dtype == torch.bool
    assert {value.item() for value in result.sums.values()} == {0.0}


def test_a_batch_rejected_whole_has_weights_of_zero():
    batch = Batch([3, 2], seed=0)
    batch.log_ratios = torch.full((5,), 3.0, dtype=torch.float64)
    result = batch.correct(EVERYTHING)
    assert not result.mask.any()
    assert result.weights.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "tokens"}, "weight='tokens': set one of none, token, sequence, geometric"),
        ({"k_level": "mean"}, "k_level='mean': set one of token, sequence_mean"),
        ({"weight_cap": 0.5}, "weight_cap=0.5: must be at least 1.*set for example 2"),
        ({"weight_cap": math.nan}, "weight_cap=nan: must be at least 1"),
        ({"token_mask": (1.1, 2.0)}, r"token_mask=\(1.1, 2.0\): .*low <= 1 <= high"),
        ({"sequence_mask": (2.0, 0.5)}, r"sequence_mask=\(2.0, 0.5\)"),
        ({"geometric_mask": (-0.1, 2.0)}, r"geometric_mask=\(-0.1, 2.0\)"),
        ({"geometric_mask": (0.9,)}, "must be two numbers"),
        ({"veto_below": 0.0}, "veto_below=0.0: must be between 0 and 1"),
        ({"veto_below": 1.0}, "veto_below=1.0: must be between 0 and 1"),
        ({"k2_limit": 0.0}, "k2_limit=0.0: must be above 0; raise it, or set None"),
        ({"k3_limit": -1.0}, "k3_limit=-1.0: must be above 0"),
        ({"m2_limit": math.nan}, "m2_limit=nan: must be above 0"),
        ({"opsm_delta": -0.1}, "opsm_delta=-0.1: must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_value_limit_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        CorrectionSettings(**options)


def test_all_problems_of_the_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"weight_cap=0(.|\n)*veto_below=2"):
        CorrectionSettings(weight_cap=0, veto_below=2)
