"""Flat rows, the choice between the layouts, slices for ranks, and costs."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.learner.attention import use_attention
from skyrl_async.learner.logprobs import token_outputs
from skyrl_async.learner.microbatch import Microbatch, empty_microbatch
from skyrl_async.learner.packing import pack, pair_cost_of, sequence_cost, split_by_cost
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import TrainSequence
from tests.learner.test_packing import GRPO, sequences_of
from tests.records import random_batch

F64 = torch.float64
LENGTHS = st.lists(st.integers(1, 200), max_size=60)
MEMBERS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=50),
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
    ),
    min_size=2,
    max_size=12,
)


def loss_tokens(sequences: list[TrainSequence]) -> list[tuple[float, ...]]:
    """Return what is known of every loss token, in order."""
    rows = []
    for s in sequences:
        for t in np.flatnonzero(s.loss_mask):
            rows.append((s.token_ids[t], s.behavior_logprobs[t], s.advantages[t]))
    return [tuple(map(float, row)) for row in rows]


@settings(max_examples=50)
@given(MEMBERS, st.sampled_from([1, 40, 100, 4096]))
def test_every_loss_token_is_in_exactly_one_flat_row_after_its_own_context(members, limit):
    sequences = sequences_of(*members)
    wanted = loss_tokens(sequences)
    contexts = [s.token_ids[:t].tolist() for s in sequences for t in np.flatnonzero(s.loss_mask)]
    longest = max(map(len, contexts))
    found = {}
    for m in pack(sequences, tokens_per_microbatch=limit, layout="flat"):
        segments = m.segments
        assert segments is not None and segments.num_tokens == m.token_ids.shape[1]
        assert len(m.token_ids) == 1 and segments.num_tokens <= max(limit, longest)
        starts = segments.cu_seqlens.tolist()
        for n, (index, source) in enumerate(zip(m.index.tolist(), m.source.tolist(), strict=True)):
            start = max(s for s in starts if s <= source)
            ids, positions = (x[0, start : source + 1] for x in (m.token_ids, m.position_ids))
            assert ids.tolist() == contexts[index]
            assert positions.tolist() == list(range(len(ids)))
            assert index not in found
            found[index] = tuple(
                float(x[n]) for x in (m.targets, m.behavior_logprobs, m.advantages)
            )
    assert [found[i] for i in range(len(found))] == wanted


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1, 100, 8192]), st.sampled_from([1, 2, 58]))
def test_both_layouts_give_the_same_logprobs_and_entropies(seed, limit, vocab_size):
    """And tree rows give those of each sequence alone, see test_packing."""
    model = build_tiny_model(hidden_size=16, num_heads=2).double()
    use_attention(model, "sdpa")
    batch = random_batch(seed, train_version=3, vocab_size=vocab_size)
    sequences = make_sequences(batch.groups, advantage=GRPO)
    results = []
    for layout in ("tree", "flat"):
        ms = pack(sequences, tokens_per_microbatch=limit, layout=layout, dtype=F64)
        order = torch.cat([m.index for m in ms]).argsort()
        with torch.no_grad():
            outputs = [token_outputs(model, m) for m in ms]
        results.append([torch.cat([o.logprobs for o in outputs])[order]])
        results[-1].append(torch.cat([o.entropy for o in outputs])[order])
    for tree, flat in zip(*results, strict=True):
        torch.testing.assert_close(tree, flat, rtol=0, atol=1e-9)


@settings(max_examples=50)
@given(MEMBERS, st.integers(1, 5))
def test_slices_hold_every_token_once(members, num_ranks):
    (whole,) = pack(sequences_of(*members), tokens_per_microbatch=4096, layout="flat")
    slices = [whole.slice_for_rank(r, num_ranks) for r in range(num_ranks)]
    length = whole.token_ids.shape[1]
    padding = -length % num_ranks
    assert {s.token_ids.shape for s in slices} == {(1, (length + padding) // num_ranks)}
    for name in ("token_ids", "position_ids"):
        joined = torch.cat([getattr(s, name) for s in slices], dim=1)
        assert torch.equal(joined[:, :length], getattr(whole, name))
    for s in slices:
        assert s.segments is not None and whole.segments is not None
        assert s.segments.lengths() == whole.segments.lengths() + [1] * padding
        assert torch.equal(s.token_ids[0, s.source], whole.token_ids[0, _source(whole, s.index)])
    assert sorted(i for s in slices for i in s.index.tolist()) == sorted(whole.index.tolist())
    for name in ("targets", "behavior_logprobs", "advantages", "policy_versions", "temperature"):
        values = dict(zip(whole.index.tolist(), getattr(whole, name).tolist(), strict=True))
        for s in slices:
            assert getattr(s, name).tolist() == [values[i] for i in s.index.tolist()]


def _source(microbatch: Microbatch, index: torch.Tensor) -> list[int]:
    places = dict(zip(microbatch.index.tolist(), microbatch.source.tolist(), strict=True))
    return [places[i] for i in index.tolist()]


def test_ranks_cannot_share_tree_rows():
    (tree,) = pack(sequences_of(([1], [2])), tokens_per_microbatch=64)
    with pytest.raises(ValueError, match="cannot share tree rows; pack with layout=flat"):
        tree.slice_for_rank(0, 2)
    with pytest.raises(ValueError, match="cannot share tree rows; pack with layout=flat"):
        tree.decoder_inputs(sequence_group=object())
    (flat,) = pack(sequences_of(([1], [2])), tokens_per_microbatch=64, layout="flat")
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        flat.slice_for_rank(2, 2)


def test_a_flat_row_has_no_mask():
    (flat,) = pack(sequences_of(([1, 2], [3])), tokens_per_microbatch=64, layout="flat")
    with pytest.raises(ValueError, match="a flat row has no attention mask"):
        flat.attention_mask()


def auto(members: list[tuple[list[int], list[int]]], **options: float) -> str:
    first, *_ = pack(sequences_of(*members), tokens_per_microbatch=8192, layout="auto", **options)
    return "tree" if first.segments is None else "flat"


def test_auto_takes_trees_where_a_prompt_is_shared():
    prompt = list(range(1, 41))
    assert auto([(prompt, [n, 50]) for n in range(16)]) == "tree"


def test_auto_takes_the_flat_row_where_tree_rows_are_mostly_padding_or_pairs_cost_most():
    words = list(range(1, 60))
    one_long = [(words * 10, words), *(([n], [n, 1]) for n in range(1, 5))]
    assert auto(one_long) == "flat"
    # Two rows of 63 tokens in either layout; a mask computes all pairs, twice as many.
    two = [([1, *words[:20]], words[:43]), ([2, *words[:20]], words[:43])]
    assert auto(two, pair_cost=0.0) == "tree"
    assert auto(two, pair_cost=1.0) == "flat"


@given(LENGTHS, st.integers(1, 5), st.sampled_from([0.0, 0.003, 1.0]))
def test_parts_have_nearly_equal_costs(lengths, num_parts, pair_cost):
    parts = split_by_cost(lengths, num_parts=num_parts, pair_cost=pair_cost)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    costs = [n + pair_cost * sum(range(1, n + 1)) for n in lengths]
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def test_pairs_weigh_more_than_tokens_in_long_sequences():
    lengths = [1000, *[100] * 10]
    assert split_by_cost(lengths, num_parts=2, pair_cost=0.0)[0] == [0]
    long, short = split_by_cost(lengths, num_parts=2, pair_cost=1.0)
    assert long == [0] and len(short) == 10
    thousands = [2000, 1000, 1000, 1000, 1000]
    assert split_by_cost(thousands, num_parts=2, pair_cost=1.0)[0] == [0]
    assert split_by_cost(thousands, num_parts=2, pair_cost=0.0)[0] == [0, 3]
    assert sequence_cost(3, pair_cost=0.5) == 3 + 0.5 * (1 + 2 + 3)


def test_the_pair_cost_counts_the_operations_of_a_layer():
    from transformers import Qwen3MoeConfig

    model = build_tiny_model()
    layer = model.model.layers[0]
    weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    heads, width = 4, 16
    logit_and_value = 2 * 2 * heads * width
    assert pair_cost_of(model.config) == logit_and_value / (2 * weights)
    moe = Qwen3MoeConfig(
        hidden_size=8,
        head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=5,
        num_experts=16,
        num_experts_per_tok=2,
        intermediate_size=1000,
    )
    at_work = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * (3 * 8 * 5)
    assert pair_cost_of(moe) == 2 * 2 * 4 / at_work


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_an_empty_microbatch_runs_and_has_zero_gradients(layout):
    microbatch = empty_microbatch(dtype=F64, layout=layout)
    assert microbatch.token_ids.shape == (1, 1) and microbatch.num_loss_tokens == 0
    assert (microbatch.segments is None) == (layout == "tree")
    model = build_tiny_model(hidden_size=16, num_heads=2).double()
    use_attention(model, "sdpa")
    outputs = token_outputs(model, microbatch)
    assert outputs.logprobs.shape == outputs.entropy.shape == (0,)
    (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_all_of_a_microbatch_moves_to_a_device(layout):
    (microbatch,) = pack(sequences_of(([1, 2], [3])), tokens_per_microbatch=64, layout=layout)
    moved = microbatch.to("meta")
    tensors = [getattr(moved, f.name) for f in fields(moved) if f.name != "segments"]
    if moved.segments is not None:
        tensors += [moved.segments.cu_seqlens, moved.segments.inverse]
        tensors += [b.index for b in moved.segments.buckets]
    assert {x.device.type for x in tensors} == {"meta"}
    inputs = moved.decoder_inputs().values()
    assert all(x.is_meta for x in inputs if isinstance(x, torch.Tensor))
