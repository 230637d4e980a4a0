"""Tokens of random sequences with rewards and values, and how to compare results on them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Sequences without tokens among them, one token, equal and different lengths.
LENGTHS = st.lists(st.integers(0, 8), max_size=7)
SEEDS = st.integers(0, 2**32 - 1)
DISCOUNTS = st.sampled_from([0.0, 0.5, 0.9, 1.0])
PROPERTY = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Batch:
    """Tokens of random sequences; ``lengths`` of all S, empty ones too.

    ``action_mask`` is for those who take the tokens as ones of which the policy sampled a part.
    """

    lengths: list[int]
    sequence_ids: Tensor
    rewards: Tensor
    values: Tensor
    log_importance: Tensor
    kl: Tensor
    turn_ids: Tensor
    action_mask: Tensor
    bootstrap_values: Tensor

    def select(self, tokens: Tensor) -> "Batch":
        per_token = {f.name for f in fields(self)} - {"lengths", "bootstrap_values"}
        return replace(self, **{name: getattr(self, name)[tokens] for name in per_token})


def random_batch(lengths: list[int], seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    turns = [np.cumsum(generator.integers(0, 2, size=n)) for n in lengths]
    mask = generator.random(total) < 0.6
    return Batch(
        lengths=lengths,
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        rewards=torch.from_numpy(generator.normal(size=total)),
        values=torch.from_numpy(generator.normal(size=total)),
        log_importance=torch.from_numpy(generator.normal(size=total)),
        kl=torch.from_numpy(generator.normal(size=total)),
        turn_ids=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *turns])),
        action_mask=torch.from_numpy(mask),
        bootstrap_values=torch.from_numpy(generator.normal(size=len(lengths))),
    )


def sequences(batch: Batch) -> Iterator[tuple[Tensor, float]]:
    """Yield the tokens of each sequence and the value after it."""
    for s in range(len(batch.lengths)):
        yield (batch.sequence_ids == s).nonzero().flatten(), batch.bootstrap_values[s].item()


def assert_close(actual: Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )
