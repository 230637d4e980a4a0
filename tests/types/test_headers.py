"""A header tells the same about a group as the group itself."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.coordination.filters import FilterSettings, rejection
from skyrl_async.coordination.staleness import (
    StalenessRule,
    count_loss_tokens,
    first_use_cost,
)
from skyrl_async.types import (
    DropReason,
    GroupHeader,
    SampledGroup,
    Trajectory,
    TrajectoryGroup,
    TrajectoryHeader,
    TrajectoryStatus,
)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    versions = draw(st.lists(st.integers(-1, 6), min_size=1, max_size=12).filter(any_sampled))
    versions = [-1, *versions]  # the first token is of the prompt
    sampled = np.array(versions) >= 0
    return Trajectory(
        token_ids=np.arange(len(versions)),
        sampled=sampled,
        behavior_logprobs=-1.0 * sampled,
        policy_versions=np.array(versions),
        temperature=1.0,
        reward=draw(st.sampled_from([0.0, 0.5, 1.0])),
        status=draw(st.sampled_from(list(TrajectoryStatus))),
        num_turns=draw(st.integers(1, 3)),
    )


def any_sampled(versions: list[int]) -> bool:
    return any(version >= 0 for version in versions)


@st.composite
def groups(draw: st.DrawFn) -> TrajectoryGroup:
    return TrajectoryGroup(
        group_id=draw(st.integers(0, 9)),
        task_id="task",
        trajectories=tuple(draw(st.lists(trajectories(), min_size=1, max_size=4))),
        failures=tuple(draw(st.lists(st.sampled_from(list(DropReason)), max_size=2))),
    )


@given(groups())
def test_fields_are_those_of_the_group(group):
    header = GroupHeader.of(group)
    for name in ("group_id", "task_id", "failures", "size_bytes", "num_generated_tokens"):
        assert getattr(header, name) == getattr(group, name)
    for name in ("min_policy_version", "max_policy_version"):
        assert getattr(header, name) == getattr(group, name)
    assert len(header.trajectories) == len(group.trajectories)
    for short, whole in zip(header.trajectories, group.trajectories, strict=True):
        for name in ("reward", "status", "num_turns", "num_generated_tokens"):
            assert getattr(short, name) == getattr(whole, name)
        for name in ("min_policy_version", "max_policy_version"):
            assert getattr(short, name) == getattr(whole, name)


@given(trajectories(), st.integers(-1, 8))
def test_tokens_since_a_version_are_counted_one_by_one(trajectory, version):
    counted = sum(
        bool(sampled) and token_version >= version
        for sampled, token_version in zip(
            trajectory.sampled, trajectory.policy_versions.tolist(), strict=True
        )
    )
    assert trajectory.num_tokens_since(version) == counted
    assert TrajectoryHeader.of(trajectory).num_tokens_since(version) == counted


@given(groups(), st.one_of(st.none(), st.integers(0, 8)))
def test_the_coordinator_decides_alike(group, cut_off):
    header = GroupHeader.of(group)
    assert first_use_cost(header, min_trainable_version=cut_off) == first_use_cost(
        group, min_trainable_version=cut_off
    )
    if cut_off is not None:
        assert count_loss_tokens(header, min_trainable_version=cut_off) == count_loss_tokens(
            group, min_trainable_version=cut_off
        )
    for name in ("mask", "drop", "pace"):
        rule = StalenessRule(name=name, max_staleness=2, groups_per_step=1)
        assert rule.deadline(header) == rule.deadline(group)
    settings_ = FilterSettings(
        zero_variance=True, max_pass_rate=0.9, pass_reward=1.0, max_truncated_fraction=0.4
    )
    assert rejection(header, settings_) == rejection(group, settings_)


@given(groups())
def test_headers_travel(group):
    header = GroupHeader.of(group)
    there = pickle.loads(pickle.dumps(header))
    assert there.trajectories == header.trajectories
    assert there.size_bytes == header.size_bytes


def test_a_header_has_no_tokens_to_train_on():
    trajectory = Trajectory(
        token_ids=[1, 2],
        sampled=[False, True],
        behavior_logprobs=[0.0, -1.0],
        policy_versions=[-1, 0],
        temperature=1.0,
        reward=1.0,
        status=TrajectoryStatus.TERMINATED,
        num_turns=1,
    )
    group = TrajectoryGroup(group_id=7, task_id="task", trajectories=(trajectory,))
    leased = SampledGroup(group=group, min_trainable_version=0)
    assert leased.trajectories == (trajectory,)
    leased = SampledGroup(group=GroupHeader.of(group), min_trainable_version=0)
    with pytest.raises(RuntimeError, match="tokens of group 7 were not fetched"):
        _ = leased.trajectories
