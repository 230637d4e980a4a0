"""Weights and masks against their formulas, and what a rejected token still does: nothing."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.aggregation import aggregation_weights
from skyrl_async.algorithms.behavior_losses import m2_mask
from skyrl_async.algorithms.composition import CorrectionSettings, correct
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
from skyrl_async.algorithms.tokens import LossTokens
from tests.algorithms import literal_corrections as literal

LEVELS = ["token", "sequence_mean", "sequence_sum", "sequence_max"]
AGGREGATIONS = ["token_mean", "sequence_mean", "prompt_mean", "constant"]
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 10**6)

# Every mask on, at limits that reject some but not all tokens of the random batches below.
EVERYTHING = CorrectionSettings(
    weight="sequence",
    weight_cap=1.5,
    normalize_weights=True,
    token_mask=(0.5, 2.0),
    sequence_mask=(0.2, 5.0),
    geometric_mask=(0.7, 1.4),
    veto_below=0.3,
    k2_limit=0.2,
    k3_limit=0.2,
    k_level="sequence_mean",
    opsm_delta=0.02,
    m2_limit=0.05,
)
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


@dataclasses.dataclass
class Batch:
    """Random logprobs of sequences of given lengths, nested and flat."""

    lengths: list[int]
    seed: int
    spread: float = 0.4

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(self.lengths)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(total, generator=generator, dtype=torch.float64)

        self.behavior = -normal(1.5).abs() - 0.01
        self.proximal = self.behavior + normal(self.spread)
        self.current = self.proximal + normal(0.1)
        self.advantages = normal(1.0)
        self.num_sequences = len(self.lengths)
        self.ids = torch.arange(self.num_sequences).repeat_interleave(torch.tensor(self.lengths))
        self.log_ratios = self.proximal - self.behavior

    def nested(self, values: torch.Tensor) -> list[list]:
        return [part.tolist() for part in values.split(self.lengths)]

    def sequences(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.log_ratios, self.ids, self.num_sequences

    def correct(self, correction_settings: CorrectionSettings):
        return correct(
            self.log_ratios,
            advantages=self.advantages,
            sequence_ids=self.ids,
            num_sequences=self.num_sequences,
            settings=correction_settings,
        )

    def tokens(self, current: torch.Tensor) -> LossTokens:
        return LossTokens(
            current_logprobs=current,
            proximal_logprobs=self.proximal,
            behavior_logprobs=self.behavior,
            advantages=self.advantages,
            sequence_ids=self.ids,
            num_sequences=self.num_sequences,
        )


def flat(nested: list[list]) -> list:
    return [value for row in nested for value in row]


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


def test_finite_mask_takes_out_what_cannot_be_a_logprob():
    logprobs = torch.tensor([-1.0, 0.0, math.nan, math.inf, -math.inf, 0.5, -80.0])
    assert finite_mask(logprobs).tolist() == [True, True, False, False, False, False, True]


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
