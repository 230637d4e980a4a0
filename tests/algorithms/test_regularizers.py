"""Terms beside the policy loss, against their formulas."""

import pytest
import torch
from hypothesis import given, settings

from skyrl_async.algorithms.regularizers import squared_log_ratio
from tests.algorithms.literal_losses import BATCH, loss_tokens


@settings(deadline=None, max_examples=40)
@given(BATCH)
def test_squared_log_ratio_is_the_square_and_its_slope_leads_back_to_the_behavior(batch):
    tokens = loss_tokens(batch)
    penalty = squared_log_ratio(tokens)
    (gradient,) = torch.autograd.grad(penalty.sum(), tokens.current_logprobs)
    rows = [row for sequence in batch for row in sequence]
    apart = [current - behavior for current, _, behavior, _ in rows]
    assert penalty.tolist() == pytest.approx([x * x for x in apart], abs=1e-12)
    assert gradient.tolist() == pytest.approx([2 * x for x in apart], abs=1e-12)
