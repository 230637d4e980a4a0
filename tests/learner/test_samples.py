"""Trajectories as they are trained: their advantages are those of the loss, token by token."""

import numpy as np
import pytest

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.samples import MAX_TOKENS, choose_samples, shown_tokens, token_texts
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from tests.records import random_batch


def samples_of(algorithm: AlgorithmSettings, *, count: int, num_minibatches: int = 3):
    """Return the samples of one step and its minibatches."""
    model = build_tiny_model(hidden_size=16, num_heads=2)
    settings = LearnerSettings(algorithm=algorithm, num_minibatches=num_minibatches)
    learner = Learner(model, settings)
    seen = []
    learner.observer = seen.extend
    learner.step(random_batch(0, train_version=0))
    return choose_samples(seen, count=count, seed=0), seen


@pytest.mark.parametrize(
    "algorithm",
    [
        AlgorithmSettings(),
        AlgorithmSettings(whiten_advantages=True),
        AlgorithmSettings(advantage="gae", critic=CriticSettings()),
    ],
    ids=["group relative", "whitened", "critic"],
)
def test_all_samples_together_have_the_advantages_of_the_loss(algorithm):
    samples, minibatches = samples_of(algorithm, count=16)
    assert len(samples) == 16
    assert len({id(s.sequence) for s in samples}) == 16
    by_sequence = {id(s.sequence): s for s in samples}
    for minibatch in minibatches:
        own = [by_sequence[id(s)] for s in minibatch.sequences]
        found = np.concatenate([s.advantages[s.sequence.loss_mask] for s in own])
        assert found == pytest.approx(minibatch.targets.advantages.numpy(), abs=1e-6)
        assert all((s.advantages[~s.sequence.loss_mask] == 0).all() for s in own)


def test_tokens_that_the_correction_rejects_are_not_in_the_loss():
    rejecting = AlgorithmSettings(correction=CorrectionSettings(sequence_mask=(0.7, 1.4)))
    samples, minibatches = samples_of(rejecting, count=16)
    kept = sum(int(m.targets.correction.mask.sum()) for m in minibatches)
    trained = sum(int(s.sequence.loss_mask.sum()) for s in samples)
    assert sum(int(s.in_loss.sum()) for s in samples) == kept < trained


def test_best_worst_and_oldest_come_first():
    samples, minibatches = samples_of(AlgorithmSettings(), count=3)
    rewards = [s.reward for m in minibatches for s in m.sequences]
    assert [s.why for s in samples][:2] == ["best", "worst"]
    assert samples[0].sequence.reward == max(rewards)
    assert samples[1].sequence.reward == min(rewards)
    assert len(samples) == 3
    assert len(samples_of(AlgorithmSettings(), count=1)[0]) == 1


def test_a_record_has_null_where_nothing_was_sampled():
    sample = samples_of(AlgorithmSettings(), count=1)[0][0]
    record = sample.record(build_tiny_tokenizer(), train_version=7)
    own = sample.sequence.policy_versions >= 0
    assert record["train_version"] == 7
    assert record["token_ids"] == sample.sequence.token_ids.tolist()
    for name in ("logprobs", "advantages"):
        assert [value is not None for value in record[name]] == own.tolist()
    assert record["in_loss"] == sample.sequence.loss_mask.astype(int).tolist()
    assert record["versions"] == sample.sequence.policy_versions.tolist()
    assert record["omitted_at"] is None


def test_of_a_long_trajectory_both_ends_are_shown():
    assert shown_tokens(MAX_TOKENS).tolist() == [*range(MAX_TOKENS)]
    shown = shown_tokens(MAX_TOKENS + 7).tolist()
    assert shown == [*range(MAX_TOKENS // 2), *range(MAX_TOKENS // 2 + 7, MAX_TOKENS + 7)]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_that_is_split_over_tokens_stands_at_the_last_one():
    text = "a☃é\x00b"
    assert token_texts([*text.encode()], Bytes()) == ["a", "", "", "☃", "", "é", "\x00", "b"]
    assert token_texts([0xE2, 0x98], Bytes()) == ["\ufffd", "\ufffd"]
