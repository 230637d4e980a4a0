from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.learner.logprobs import token_outputs
from skyrl_async.learner.packing import fill_rows, pack
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import SampledGroup, TrainSequence, TrajectoryGroup
from tests.records import make_trajectory, make_turn, random_batch

GRPO = partial(estimate, "grpo")

LENGTHS = st.lists(st.integers(1, 64), max_size=60)


@given(LENGTHS)
def test_every_sequence_is_in_exactly_one_row_and_rows_are_not_overfull(lengths):
    rows = fill_rows(lengths, row_tokens=64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


@given(LENGTHS)
def test_at_most_one_row_is_less_than_half_full(lengths):
    rows = fill_rows(lengths, row_tokens=64)
    assert sum(sum(lengths[i] for i in row) < 32 for row in rows) <= 1


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="65 tokens does not fit rows of 64"):
        fill_rows([65], row_tokens=64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1, 100, 8192]), st.sampled_from([1, 2, 58]))
def test_packed_logprobs_equal_those_of_each_sequence_alone(
    seed, tokens_per_microbatch, vocab_size
):
    """With 1 and 2 words many sequences begin alike, or are beginnings of others."""
    model = build_tiny_model(hidden_size=16, num_heads=2).double()
    batch = random_batch(seed, train_version=3, vocab_size=vocab_size)
    sequences = make_sequences(batch.groups, advantage=GRPO)
    microbatches = pack(sequences, tokens_per_microbatch=tokens_per_microbatch, dtype=torch.float64)
    rows = []
    with torch.no_grad():
        for microbatch in microbatches:
            outputs = token_outputs(model, microbatch)
            logprobs, entropy = outputs.logprobs, outputs.entropy
            rows += zip(
                microbatch.targets.tolist(),
                microbatch.behavior_logprobs.tolist(),
                microbatch.advantages.tolist(),
                logprobs.tolist(),
                entropy.tolist(),
                strict=True,
            )
        expected = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).unsqueeze(0)
            all_logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            for t in np.flatnonzero(sequence.loss_mask):
                at = all_logprobs[t - 1]
                token = int(sequence.token_ids[t])
                expected.append(
                    (
                        token,
                        float(sequence.behavior_logprobs[t]),
                        float(sequence.advantages[t]),
                        at[token].item(),
                        -(at.exp() * at).sum().item(),
                    )
                )
    assert len(rows) == len(expected)
    for got, wanted in zip(sorted(rows), sorted(expected), strict=True):
        assert got == pytest.approx(wanted, abs=1e-9)


def test_next_to_nothing_is_padding():
    sequences = make_sequences(
        random_batch(0, train_version=3, num_groups=16, group_size=16).groups, advantage=GRPO
    )
    microbatches = pack(sequences, tokens_per_microbatch=8192)
    computed = sum(m.token_ids.numel() for m in microbatches)
    assert sum(len(s.token_ids) for s in sequences) / computed > 0.97


def sequences_of(*members: tuple[list[int], list[int]]) -> list[TrainSequence]:
    trajectories = tuple(make_trajectory(make_turn(*member)) for member in members)
    group = TrajectoryGroup(group_id=0, task_id="t", trajectories=trajectories)
    return make_sequences([SampledGroup(group=group, min_trainable_version=0)], advantage=GRPO)


def test_a_common_beginning_is_computed_once():
    sequences = sequences_of(([1, 2, 3], [7, 9]), ([1, 2, 3], [5, 9]), ([1, 2, 3], [7, 8]))
    (microbatch,) = pack(sequences, tokens_per_microbatch=64)
    assert microbatch.token_ids.tolist() == [[1, 2, 3, 5, 7]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3, 3]]
    assert microbatch.subtree_ends.tolist() == [[5, 5, 5, 4, 5]]
    pairs = zip(microbatch.source.tolist(), microbatch.targets.tolist(), strict=True)
    assert sorted(pairs) == [(2, 5), (2, 7), (2, 7), (3, 9), (4, 8), (4, 9)]
    seen = microbatch.attention_mask()[0, 0].int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0] and seen[4] == [1, 1, 1, 0, 1]


def test_a_group_with_one_prompt_costs_little_more_than_one_member():
    prompt = list(range(1, 41))
    sequences = sequences_of(*((prompt, [a, 50]) for a in range(16)))
    (microbatch,) = pack(sequences, tokens_per_microbatch=8192)
    assert microbatch.token_ids.shape == (1, 40 + 16)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=30))
def test_trees_are_not_larger_than_a_row_and_no_row_is_added_by_merging(prompts):
    sequences = sequences_of(*((prompt, [3, 4]) for prompt in [*prompts, prompts[0]]))
    microbatches = pack(sequences, tokens_per_microbatch=64)
    assert all(m.token_ids.shape[1] <= 64 for m in microbatches)
    lengths = [len(s.token_ids) - 1 for s in sequences]
    assert len(microbatches) <= len(fill_rows(lengths, row_tokens=64))


def test_beginnings_are_not_merged_where_that_would_need_more_rows():
    """Sorted by their tokens, contexts of 24, 24, 40 and 40 need three rows; separate ones two."""
    lengths = {2: 24, 3: 24, 4: 40, 5: 40}
    sequences = sequences_of(*(([1, *[word] * (n - 2)], [8, 9]) for word, n in lengths.items()))
    (microbatch,) = pack(sequences, tokens_per_microbatch=8192)
    assert microbatch.token_ids.shape == (2, 64)


def test_the_prefix_version_is_the_oldest_so_far():
    trajectory = make_trajectory(
        make_turn([1, 2], [3, 4], version=[5, 6]), make_turn([7], [8, 9], version=[6, 7])
    )
    group = TrajectoryGroup(group_id=0, task_id="t", trajectories=(trajectory, trajectory))
    sequences = make_sequences([SampledGroup(group=group, min_trainable_version=6)], advantage=GRPO)
    (microbatch,) = pack(sequences[:1], tokens_per_microbatch=64)
    assert microbatch.policy_versions.tolist() == [6, 6, 7]
    assert microbatch.prefix_versions.tolist() == [5, 5, 5]
    assert microbatch.targets.tolist() == [4, 8, 9]
