"""Records refuse what cannot be, keep their arrays from change, and survive the way to others."""

import pickle

import numpy as np
import pytest

from skyrl_async.types import (
    BYTES_PER_TOKEN,
    RECORD_OVERHEAD_BYTES,
    DepartedGroup,
    DropReason,
    FinishReason,
    Generation,
    GroupFate,
    Sampling,
    StoredGroup,
    Task,
    TrainSequence,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    WeightManifest,
)
from tests.records import make_trajectory, make_turn

ARRAYS = ("token_ids", "sampled", "behavior_logprobs", "policy_versions")


def make_generation(**changes):
    values = {
        "token_ids": [5, 6],
        "logprobs": [-1.0, -2.0],
        "policy_versions": [3, 4],
        "temperature": 1.0,
        "finish_reason": FinishReason.STOP,
    }
    return Generation(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": [-1.0]}, r"differ in length: \(2, 1, 2\)"),
        ({"logprobs": [-1.0, float("nan")]}, "logprobs must be finite"),
        ({"logprobs": [-1.0, -float("inf")]}, "logprobs must be finite"),
        ({"logprobs": [-1.0, 0.5]}, "logprobs must be finite and <= 0"),
        ({"policy_versions": [4, 3]}, "never decrease"),
        ({"policy_versions": [-1, 3]}, "must be >= 0"),
        ({"token_ids": [[5], [6]]}, r"one dimension, got shape \(2, 1\)"),
        ({"routed_experts": np.zeros((1, 2, 2), np.int16)}, "routed_experts has 1 entries for 2"),
    ],
)
def test_what_no_engine_may_return(changes, message):
    with pytest.raises(ValueError, match=message):
        make_generation(**changes)


def test_an_empty_generation_is_possible():
    empty = make_generation(token_ids=[], logprobs=[], policy_versions=[])
    assert len(empty.token_ids) == 0


def make_values(**changes):
    values = {
        "token_ids": [1, 2, 3],
        "sampled": [False, True, True],
        "behavior_logprobs": [0.0, -1.0, -1.0],
        "policy_versions": [-1, 2, 3],
        "temperature": 1.0,
        "reward": 1.0,
        "status": TrajectoryStatus.TERMINATED,
        "num_turns": 1,
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled": [False, True]}, "3 token ids, 2 sampled"),
        ({"sampled": [False] * 3}, "at least one sampled token"),
        ({"sampled": [True] * 3}, "a prompt comes first"),
        ({"reward": float("nan")}, "reward must be finite, got nan"),
    ],
)
def test_what_no_trajectory_may_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(**make_values(**changes))


def test_a_trajectory_counts_its_tokens():
    trajectory = Trajectory(**make_values())
    assert trajectory.num_generated_tokens == 2
    assert (trajectory.min_policy_version, trajectory.max_policy_version) == (2, 3)
    assert trajectory.size_bytes == RECORD_OVERHEAD_BYTES + 3 * BYTES_PER_TOKEN


def test_the_callers_arrays_stay_the_callers():
    mine = np.array([1, 2, 3], np.int32)
    trajectory = Trajectory(**make_values(token_ids=mine))
    mine[0] = 9
    assert trajectory.token_ids[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        trajectory.token_ids[0] = 9


def test_turns_become_one_sequence():
    trajectory = make_trajectory(
        make_turn([1, 2], [5, 0], version=3), make_turn([7, 8], [6, 0], version=4), reward=0.5
    )
    assert trajectory.token_ids.tolist() == [1, 2, 5, 0, 7, 8, 6, 0]
    assert trajectory.sampled.tolist() == [False, False, True, True] * 2
    assert trajectory.policy_versions.tolist() == [-1, -1, 3, 3, -1, -1, 4, 4]
    assert trajectory.behavior_logprobs.tolist() == [0, 0, -1, -1] * 2
    assert not any(getattr(trajectory, name).flags.writeable for name in ARRAYS)


def test_turns_of_two_temperatures_are_refused():
    turns = make_turn([1], [2], temperature=1.0), make_turn([1], [2], temperature=0.5)
    with pytest.raises(ValueError, match=r"several temperatures: \[0.5, 1.0\]"):
        make_trajectory(*turns)


def test_a_trajectory_without_turns_is_refused():
    with pytest.raises(ValueError, match="at least one turn"):
        make_trajectory()


def test_a_group_is_the_same_after_its_way_to_another_process():
    members = (
        make_trajectory(make_turn([1, 2], [5], version=3), reward=0.25),
        make_trajectory(make_turn([1, 2], [6, 7, 8], version=[3, 4, 4])),
    )
    group = TrajectoryGroup(
        group_id=4, task_id="t", trajectories=members, failures=(DropReason.STEP_TIMEOUT,)
    )
    there = pickle.loads(pickle.dumps(group))
    for name in ("group_id", "task_id", "failures", "size_bytes", "num_generated_tokens"):
        assert getattr(there, name) == getattr(group, name)
    for other, own in zip(there.trajectories, members, strict=True):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(other, name), getattr(own, name))
            assert getattr(other, name).dtype == getattr(own, name).dtype
            assert not getattr(other, name).flags.writeable
        for name in ("reward", "status", "num_turns", "min_policy_version", "size_bytes"):
            assert getattr(other, name) == getattr(own, name)


def test_a_group_without_members_is_refused():
    with pytest.raises(ValueError, match="at least one trajectory"):
        TrajectoryGroup(group_id=0, task_id="t", trajectories=())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(task_id="", environment="e", seed=0), "must not be empty"),
        (lambda: Task(task_id="t", environment="e", seed=-1), "seed must be >= 0, got -1"),
        (lambda: Sampling(max_tokens=0), "max_tokens must be >= 1, got 0"),
        (lambda: Sampling(max_tokens=1, temperature=float("inf")), "temperature must be finite"),
        (lambda: Sampling(max_tokens=1, top_p=0.0), r"top_p must be in \(0, 1\]"),
        (lambda: Sampling(max_tokens=1, top_k=-1), "top_k must be >= 0"),
    ],
)
def test_what_cannot_be_asked_for(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_uses_and_versions_of_a_stored_group_fit():
    group = TrajectoryGroup(
        group_id=0, task_id="t", trajectories=(make_trajectory(make_turn([1], [2])),)
    )
    with pytest.raises(ValueError, match="times_sampled=1 does not fit made_version=None"):
        StoredGroup(group=group, times_sampled=1)
    stored = StoredGroup(group=group)
    with pytest.raises(ValueError, match="does not fit reason None"):
        DepartedGroup(stored=stored, fate=GroupFate.DROPPED)


def test_a_sequence_cannot_begin_with_loss():
    values = {
        "token_ids": np.array([1, 2]),
        "behavior_logprobs": np.zeros(2),
        "policy_versions": np.zeros(2),
        "temperature": 1.0,
        "advantages": np.zeros(2),
        "reward": 0.0,
        "group_id": 0,
    }
    with pytest.raises(ValueError, match="first token cannot carry loss"):
        TrainSequence(loss_mask=np.array([True, True]), **values)
    with pytest.raises(ValueError, match="differ in length: 2 token ids"):
        TrainSequence(loss_mask=np.array([False]), **values)


def test_lists_of_a_manifest_fit():
    with pytest.raises(ValueError, match="1 names, 0 dtypes, 1 shapes"):
        WeightManifest(policy_version=0, names=("w",), dtypes=(), shapes=((1,),), checksum=0)
    with pytest.raises(ValueError, match="policy_version must be >= 0, got -1"):
        WeightManifest(policy_version=-1, names=(), dtypes=(), shapes=(), checksum=0)
