"""The baseline of least variance, where the weight of a trajectory is truncated."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.learner.off_policy_baseline import with_off_policy_baseline
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import TrainSequence
from tests.algorithms.literal_advantages import optimal_off_policy_baseline
from tests.records import random_batch


def weight_and_norm(model, sequence: TrainSequence) -> tuple[float, float]:
    """Return the product of a trajectory's ratios, and the squared norm of its gradient."""
    model.zero_grad()
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    where = np.flatnonzero(sequence.loss_mask)
    total = sum(logprobs[t - 1, ids[t]] for t in where)
    total.backward()
    norm = sum(p.grad.square().sum().item() for p in model.parameters())
    behavior = math.fsum(float(sequence.behavior_logprobs[t]) for t in where)
    return math.exp(total.item() - behavior), norm


def scene(*, members: int) -> list[TrainSequence]:
    groups = random_batch(3, train_version=0, num_groups=2, group_size=members).groups
    sequences = make_sequences(groups, advantage=partial(estimate, "mean_centered"))
    return [replace(s, reward=float(number % 3)) for number, s in enumerate(sequences)]


def check(sequences: list[TrainSequence], *, cap: float) -> list[float]:
    """Compare with the literal formula over each group; return the weights, not truncated."""
    model = build_tiny_model(hidden_size=16, num_heads=2).double()
    found = with_off_policy_baseline(sequences, model, ranks=RankGroup(), weight_cap=cap)
    weights: list[float] = []
    for group_id in sorted({s.group_id for s in sequences}):
        own = [n for n, s in enumerate(sequences) if s.group_id == group_id]
        w, g = zip(*(weight_and_norm(model, sequences[n]) for n in own), strict=True)
        weights += w
        R = [sequences[n].reward for n in own]
        A = optimal_off_policy_baseline(R, [min(x, cap) for x in w], g)
        for n, advantage in zip(own, A, strict=True):
            mask = found[n].loss_mask
            assert found[n].advantages[mask] == pytest.approx(advantage, abs=1e-5)
            assert not found[n].advantages[~mask].any()
    return weights


def test_the_baseline_weighs_members_by_their_ratios_and_gradient_norms():
    assert len(set(check(scene(members=3), cap=3.0))) == 6


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_a_product_of_ratios_far_beyond_the_cap_weighs_no_more_than_the_cap(cap):
    sequences = scene(members=4)
    # In each group, one trajectory that the present policy finds far likelier.
    for number in (1, 6):
        unlikely = sequences[number].behavior_logprobs - 9.0 * sequences[number].loss_mask
        sequences[number] = replace(sequences[number], behavior_logprobs=unlikely)
    weights = check(sequences, cap=cap)
    assert sum(w > 1000 * cap for w in weights) == 2 and min(weights) < cap
