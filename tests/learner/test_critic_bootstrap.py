"""What a limit cut off has a value after its last token; what ended has none."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from skyrl_async.learner.algorithm_settings import VALUE_ESTIMATORS, AlgorithmSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.critic_bootstrap import values_after
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.packing import pack
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import SampledBatch, TrajectoryGroup, TrajectoryStatus
from tests.learner.test_packing import GRPO
from tests.records import random_batch

GAMMA = 0.9
ENDED, CUT_OFF = TrajectoryStatus.TERMINATED, TrajectoryStatus.TRUNCATED


def with_status(batch: SampledBatch, *statuses: TrajectoryStatus) -> SampledBatch:
    """Return the batch with these statuses of its trajectories, over and over."""
    number = iter(range(10**6))

    def changed(group: TrajectoryGroup) -> TrajectoryGroup:
        members = [
            replace(t, status=statuses[next(number) % len(statuses)]) for t in group.trajectories
        ]
        return replace(group, trajectories=tuple(members))

    groups = [replace(sampled, group=changed(sampled.group)) for sampled in batch.groups]
    return replace(batch, groups=tuple(groups))


def new_learner(*, advantage: str = "gae", kind: str = "model", lam: float = 1.0, **critic: Any):
    """Return a learner whose critic has values, as the one of a new learner has none."""
    algorithm = AlgorithmSettings(
        advantage=advantage,
        gamma=GAMMA,
        gae_lambda=lam,
        critic=CriticSettings(kind=kind, **{"bootstrap_truncated": True, **critic}),
    )
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2),
        LearnerSettings(algorithm=algorithm, num_minibatches=1),
    )
    with torch.no_grad():
        learner.critic.trainer.module.head.weight.normal_(
            generator=torch.Generator().manual_seed(0)
        )
        learner.critic.trainer.module.head.bias.fill_(0.25)
    return learner


def values_of_whole_sequences(learner: Learner, kind: str, token_ids: np.ndarray) -> torch.Tensor:
    """Return ``[T]``: the value of the state that ends with each token, one sequence at a time."""
    module = learner.critic.trainer.module
    decoder = module.decoder if kind == "model" else learner.model.get_decoder()
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    positions = torch.arange(length)[None]
    with torch.no_grad():
        hidden = decoder(
            input_ids=ids, position_ids=positions, attention_mask=causal, use_cache=False
        ).last_hidden_state
        return module.head(hidden)[0, :, 0]


def step_targets(learner: Learner, batch: SampledBatch):
    """Take one step and return its only minibatch."""
    seen = []
    learner.observer = seen.extend
    assert not learner.step(batch).skipped
    (minibatch,) = seen
    return minibatch


@pytest.mark.parametrize("layout", ["tree", "flat"])
@pytest.mark.parametrize("tokens_per_microbatch", [16, 4096])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_the_value_after_a_sequence_is_that_of_a_state_which_has_seen_all_of_it(
    kind, tokens_per_microbatch, layout
):
    learner = new_learner(kind=kind)
    groups = random_batch(1, train_version=3).groups
    sequences = make_sequences(groups, advantage=GRPO)
    chosen = [number % 3 != 1 for number in range(len(sequences))]
    packing = replace(learner.packing, tokens_per_microbatch=tokens_per_microbatch, layout=layout)
    after = values_after(
        learner.critic, sequences, chosen, trainer=learner.trainer, packing=packing
    )
    expected = [
        values_of_whole_sequences(learner, kind, s.token_ids)[-1].item() if own else 0.0
        for s, own in zip(sequences, chosen, strict=True)
    ]
    assert len({round(value, 4) for value in expected}) > 3
    assert after.tolist() == pytest.approx(expected, abs=1e-5)
    nothing = values_after(
        learner.critic,
        sequences,
        [False] * len(sequences),
        trainer=learner.trainer,
        packing=packing,
    )
    assert not nothing.any()


def test_equal_sequences_have_equal_values():
    learner = new_learner()
    (sequence, *_) = make_sequences(random_batch(1, train_version=3).groups, advantage=GRPO)
    after = values_after(
        learner.critic,
        [sequence] * 3,
        [True, False, True],
        trainer=learner.trainer,
        packing=replace(learner.packing, layout="tree"),
    )
    assert after[0] == after[2] != 0 == after[1]


@pytest.mark.parametrize("kind", ["head", "model"])
def test_cut_off_and_ended_returns_differ_by_the_discounted_last_value(kind):
    batch = random_batch(0, train_version=0)
    ended = step_targets(new_learner(kind=kind), with_status(batch, ENDED))
    learner = new_learner(kind=kind)
    last = {
        s.token_ids.tobytes(): values_of_whole_sequences(learner, kind, s.token_ids)[-1].item()
        for s in ended.sequences
    }
    half = step_targets(learner, with_status(batch, CUT_OFF, ENDED))
    torch.testing.assert_close(
        half.targets.values.old_values, ended.targets.values.old_values, rtol=0, atol=0
    )
    gained = (half.targets.values.targets - ended.targets.values.targets).tolist()
    advantages = (half.targets.advantages - ended.targets.advantages).tolist()
    expected: list[float] = []
    for sequence in half.sequences:
        value = last[sequence.token_ids.tobytes()] if sequence.truncated else 0.0
        length = int(sequence.loss_mask.sum())
        expected += [value * GAMMA**k for k in range(length, 0, -1)]
    assert sum(s.truncated for s in half.sequences) == len(half.sequences) / 2
    assert max(map(abs, expected)) > 0.1
    assert gained == pytest.approx(expected, abs=1e-5)
    assert advantages == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("advantage", VALUE_ESTIMATORS)
def test_every_estimator_with_values_looks_beyond_the_cut_only_if_it_is_told_to(advantage):
    batch = with_status(random_batch(0, train_version=0), CUT_OFF, ENDED)
    told, not_told = (
        step_targets(new_learner(advantage=advantage, lam=0.9, bootstrap_truncated=choice), batch)
        for choice in (True, False)
    )
    differs = told.targets.values.targets != not_told.targets.values.targets
    for number, sequence in enumerate(told.sequences):
        own = told.tokens.sequence_ids == number
        assert bool(differs[own].any()) == sequence.truncated


def test_the_value_before_the_last_token_is_another_than_that_after_it():
    sequences = make_sequences(random_batch(2, train_version=3).groups, advantage=GRPO)
    learner = new_learner()
    (microbatch,) = pack(sequences[:1], tokens_per_microbatch=64)
    before = learner.critic.values(microbatch)[-1].item()
    whole = values_of_whole_sequences(learner, "model", sequences[0].token_ids)
    assert before == pytest.approx(whole[-2].item(), abs=1e-5)
    assert before != pytest.approx(whole[-1].item(), abs=1e-3)


def _values_of_rank(
    rank: int, num_ranks: int, port: int, folder: str, kind: str, shard_ranks: int
) -> None:
    torch.set_num_threads(1)
    ranks = RankGroup(
        rank=rank,
        num_ranks=num_ranks,
        store_address=("127.0.0.1", port),
        shard_ranks=shard_ranks,
    )
    algorithm = AlgorithmSettings(advantage="gae", critic=CriticSettings(kind=kind))
    learner = Learner(
        build_tiny_model(hidden_size=16, num_heads=2),
        LearnerSettings(algorithm=algorithm),
        ranks=ranks,
    )
    with torch.no_grad():
        learner.critic.trainer.module.head.weight.fill_(0.1)
    sequences = make_sequences(random_batch(1, train_version=3).groups, advantage=GRPO)
    found = [
        values_after(
            learner.critic,
            sequences,
            [number in chosen for number in range(len(sequences))],
            trainer=learner.trainer,
            packing=replace(learner.packing, tokens_per_microbatch=16),
        )
        # Of a single sequence, one rank has none.
        for chosen in (range(0, 9, 2), [3], [])
    ]
    torch.save(torch.stack(found), f"{folder}/{rank}.pt")
    ranks.close()


@pytest.mark.parametrize("shard_ranks", [1, 2])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_every_rank_has_the_values_of_one(tmp_path, free_port, kind, shard_ranks):
    _values_of_rank(0, 1, 0, str(tmp_path), kind, 1)
    alone = torch.load(tmp_path / "0.pt")
    assert alone[0].count_nonzero() == 5 and alone[1].count_nonzero() == 1
    mp.start_processes(
        _values_of_rank,
        args=(2, free_port, str(tmp_path), kind, shard_ranks),
        nprocs=2,
        start_method="fork",
    )
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone, rtol=0, atol=1e-5)


def test_left_out_trajectories_change_nothing_but_the_baseline():
    """But for its reward in the baseline, a truncated trajectory may as well be another one."""
    algorithm = AlgorithmSettings(mask_truncated=True, advantage="mean_centered")
    batch = with_status(random_batch(0, train_version=0), CUT_OFF, ENDED)
    other = with_status(random_batch(0, train_version=0), CUT_OFF, ENDED)
    for sampled in other.groups:
        for t in sampled.group.trajectories:
            if t.status is CUT_OFF:
                object.__setattr__(t, "behavior_logprobs", t.behavior_logprobs - np.float32(0.5))
    weights = []
    for trained in (batch, other):
        learner = Learner(
            build_tiny_model(hidden_size=16, num_heads=2), LearnerSettings(algorithm=algorithm)
        )
        result = learner.step(trained)
        ended = [t for g in trained.groups for t in g.trajectories if t.status is ENDED]
        assert result.metrics["learner/loss_tokens"] == sum(t.num_generated_tokens for t in ended)
        weights.append([p.detach().clone() for p in learner.model.parameters()])
    for mine, theirs in zip(*weights, strict=True):
        assert torch.equal(mine, theirs)
