"""Aggregation against its formulas, and against any split of the minibatch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.aggregation import aggregation_weights
from tests.algorithms import literal_corrections as literal

KINDS = ["token_mean", "sequence_mean", "prompt_mean", "constant"]
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def nested_batch(lengths: list[int], seed: int):
    """Losses, a mask with some tokens out, and a prompt for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    losses = [
        torch.randn(length, generator=generator, dtype=torch.float64).tolist() for length in lengths
    ]
    mask = [(torch.rand(length, generator=generator) < 0.7).tolist() for length in lengths]
    prompts = torch.randint(0, 3, (len(lengths),), generator=generator).tolist()
    return losses, mask, prompts


def flat(nested, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor([x for row in nested for x in row], dtype=dtype)


def ids_of(lengths: list[int], of_sequences: list[int]) -> torch.Tensor:
    return torch.tensor(of_sequences, dtype=torch.int64).repeat_interleave(torch.tensor(lengths))


def weights_of(lengths, prompts, kind, mask=None, dtype=torch.float64):
    return aggregation_weights(
        ids_of(lengths, list(range(len(lengths)))),
        ids_of(lengths, prompts),
        kind=kind,
        constant_length=7,
        mask=mask,
        dtype=dtype,
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 10**6))
def test_weighted_sum_equals_the_literal_formula(kind, lengths, seed):
    losses, mask, prompts = nested_batch(lengths, seed)
    weights = weights_of(lengths, prompts, kind, flat(mask, torch.bool))
    expected = literal.aggregate(losses, prompts, mask, kind, constant_length=7)
    assert (weights * flat(losses)).sum().item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 10**6), num_parts=st.integers(1, 5))
def test_loss_and_gradient_do_not_depend_on_the_split_over_ranks_and_microbatches(
    kind, lengths, seed, num_parts
):
    losses, mask, prompts = nested_batch(lengths, seed)
    sequence_ids = ids_of(lengths, list(range(len(lengths))))
    features = flat(losses)
    weights = weights_of(lengths, prompts, kind, flat(mask, torch.bool))

    def loss_and_gradient(part: torch.Tensor) -> tuple[float, float]:
        parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = (weights[part] * torch.sin(parameter * features[part])).sum()
        loss.backward()
        assert parameter.grad is not None
        return loss.item(), parameter.grad.item()

    generator = torch.Generator().manual_seed(seed + 1)
    part_of_sequence = torch.randint(0, num_parts, (len(lengths),), generator=generator)
    parts = [part_of_sequence[sequence_ids] == part for part in range(num_parts)]
    whole = loss_and_gradient(torch.ones_like(sequence_ids, dtype=torch.bool))
    split = [sum(column) for column in zip(*map(loss_and_gradient, parts), strict=True)]
    assert split == pytest.approx(list(whole), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 10**6))
def test_masked_tokens_weigh_nothing_and_the_others_as_if_those_were_absent(kind, lengths, seed):
    _, nested_mask, prompts = nested_batch(lengths, seed)
    mask = flat(nested_mask, torch.bool)
    with_mask = weights_of(lengths, prompts, kind, mask)
    kept_lengths = [sum(row) for row in nested_mask]
    without = weights_of(kept_lengths, prompts, kind)
    assert with_mask[~mask].tolist() == [0.0] * int((~mask).sum())
    assert with_mask[mask].tolist() == pytest.approx(without.tolist(), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 10**6))
def test_weights_of_means_sum_to_one_if_any_token_is_kept(lengths, seed):
    _, mask, prompts = nested_batch(lengths, seed)
    expected = 1.0 if any(any(row) for row in mask) else 0.0
    for kind in KINDS[:3]:
        total = weights_of(lengths, prompts, kind, flat(mask, torch.bool)).sum().item()
        assert total == pytest.approx(expected, abs=1e-12), kind


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_numbers_of_sequences_and_prompts_do_not_matter(kind):
    lengths, prompts = [2, 4, 1], [5, 5, 9]
    expected = weights_of(lengths, prompts, kind)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([10**12, 3, -8])[ids_of(lengths, [0, 1, 2])]
    weights = aggregation_weights(
        renamed[order],
        ids_of(lengths, [7, 7, -1])[order],
        kind=kind,
        constant_length=7,
        dtype=torch.float64,
    )
    assert weights.tolist() == expected[order].tolist()


def test_worked_example_of_each_kind():
    # Two replies of 1 and 3 tokens to one prompt, one of 4 to another.
    lengths, prompts = [1, 3, 4], [0, 0, 1]
    first_of_each = {
        kind: weights_of(lengths, prompts, kind)[torch.tensor([0, 1, 4])].tolist() for kind in KINDS
    }
    assert first_of_each["token_mean"] == pytest.approx([1 / 8] * 3)
    assert first_of_each["sequence_mean"] == pytest.approx([1 / 3, 1 / 9, 1 / 12])
    assert first_of_each["prompt_mean"] == pytest.approx([1 / 8] * 3)
    assert first_of_each["constant"] == pytest.approx([1 / 21] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_and_no_kept_tokens_give_finite_weights(kind):
    assert weights_of([0, 0], [0, 1], kind).shape == (0,)
    nothing = weights_of([2, 1], [0, 1], kind, torch.zeros(3, dtype=torch.bool))
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_weights_have_the_dtype_asked_for():
    for dtype in (torch.float32, torch.float64):
        assert weights_of([2, 1], [0, 1], "prompt_mean", dtype=dtype).dtype == dtype


@pytest.mark.parametrize("length", [None, 0, -3])
def test_constant_without_a_positive_length_is_refused(length):
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"constant_length={length}"):
        aggregation_weights(ids, ids, kind="constant", constant_length=length)


def test_unequal_shapes_are_refused():
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="differ in shape"):
        aggregation_weights(ids, ids[:1], kind="token_mean")
    with pytest.raises(ValueError, match="differ in shape"):
        aggregation_weights(ids, ids, kind="token_mean", mask=torch.ones(3, dtype=torch.bool))
