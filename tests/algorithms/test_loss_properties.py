"""What every policy loss promises, whatever its formula."""

import pytest
import torch

from skyrl_async.algorithms.behavior_losses import (
    aipo,
    double_sided,
    dppo_kl,
    dppo_tv,
    m2po,
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
from skyrl_async.algorithms.sequence_losses import gmpo, gspo, topr, vespo
from tests.algorithms.literal_losses import gradients, loss_tokens, random_batch

WITH_A_TRUST_REGION = [
    ppo_clip,
    dual_clip,
    ppo_behavior,
    dppo_tv,
    dppo_kl,
    m2po,
    double_sided,
    gspo,
    gmpo,
]
WITHOUT = [cispo, sapo, reinforce, kimi_squared_log, reinforce_is, aipo, topr_token, vespo, topr]
LOSSES = WITH_A_TRUST_REGION + WITHOUT


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_the_gradient_is_that_of_reinforce(loss):
    tokens = loss_tokens(random_batch([3, 1, 5], seed=0, on_policy=True))
    result = loss(tokens)
    assert gradients(result, tokens) == pytest.approx((-tokens.advantages).tolist(), abs=1e-12)
    assert not result.clipped.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_permuting_sequences_permutes_the_outputs(loss):
    lengths, order = [3, 1, 4, 2], [2, 0, 3, 1]
    batch = random_batch(lengths, seed=1)
    tokens, permuted = loss_tokens(batch), loss_tokens([batch[index] for index in order])
    result, other = loss(tokens), loss(permuted)
    slopes, other_slopes = gradients(result, tokens), gradients(other, permuted)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    source = [starts[i] + offset for i in order for offset in range(lengths[i])]
    torch.testing.assert_close(other.loss, result.loss[source], rtol=1e-12, atol=1e-12)
    assert other.clipped.tolist() == result.clipped[source].tolist()
    assert other_slopes == pytest.approx([slopes[index] for index in source], rel=1e-12)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss is not m2po])
def test_splitting_sequences_over_two_calls_changes_nothing(loss):
    batch = random_batch([3, 1, 4, 2], seed=2)
    whole, parts = loss_tokens(batch), [loss_tokens(batch[:2]), loss_tokens(batch[2:])]
    result, results = loss(whole), [loss(part) for part in parts]
    joined = torch.cat([part.loss for part in results])
    torch.testing.assert_close(joined, result.loss, rtol=1e-12, atol=1e-12)
    assert torch.cat([part.clipped for part in results]).tolist() == result.clipped.tolist()
    slopes = [
        slope
        for part, tokens in zip(results, parts, strict=True)
        for slope in gradients(part, tokens)
    ]
    assert slopes == pytest.approx(gradients(result, whole), rel=1e-12)


@pytest.mark.parametrize("loss", WITH_A_TRUST_REGION)
def test_clipped_tokens_have_exactly_zero_gradient_and_the_others_have_one(loss):
    tokens = loss_tokens(random_batch([6] * 10, seed=3))
    result = loss(tokens)
    slopes = torch.tensor(gradients(result, tokens))
    assert 0 < result.clipped.sum() < len(slopes)
    assert result.clipped.dtype == torch.bool
    assert (slopes[result.clipped] == 0).all()
    assert (slopes[~result.clipped] != 0).all()


@pytest.mark.parametrize("loss", WITHOUT)
def test_losses_without_a_trust_region_leave_every_token_a_gradient(loss):
    tokens = loss_tokens(random_batch([6] * 10, seed=4, spread=0.5))
    result = loss(tokens)
    assert not result.clipped.any()
    assert all(slope != 0 for slope in gradients(result, tokens))


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_without_advantage_have_no_policy_gradient(loss):
    batch = [[(c, p, b, 0.0) for c, p, b, _ in rows] for rows in random_batch([4, 4], seed=5)]
    tokens = loss_tokens(batch)
    result = loss(tokens, penalty=0.0) if loss is kimi_squared_log else loss(tokens)
    assert gradients(result, tokens) == [0.0] * 8
    assert result.loss.tolist() == [0.0] * 8


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_give_empty_outputs(loss):
    for batch in ([], [[], []]):
        tokens = loss_tokens(batch)
        result = loss(tokens)
        assert result.loss.shape == result.clipped.shape == (0,)
        assert gradients(result, tokens) == []


@pytest.mark.parametrize("advantage", [1.0, 0.0, 50.0, -50.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_beyond_the_number_format_leave_losses_and_gradients_finite(loss, advantage):
    row = (-0.5, -200.0, -200.0, advantage)
    tokens = loss_tokens([[row, row], [row]], dtype=torch.float32)
    result = loss(tokens)
    slopes = torch.tensor(gradients(result, tokens))
    assert result.loss.isfinite().all()
    assert slopes.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_differentiable_and_the_clipped_flags_are_not(loss):
    tokens = loss_tokens(random_batch([3, 2], seed=6))
    assert not loss(tokens).clipped.requires_grad
    assert loss(tokens).loss.requires_grad
