"""Tokens apart from reports: every group finds its own again, whatever was dropped between."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.runtime import ray_groups
from skyrl_async.runtime.ray_groups import (
    gather_batch,
    object_store_bytes,
    place_batch,
    place_report,
    split_report,
)
from skyrl_async.types import (
    DroppedGroup,
    DropReason,
    GroupHeader,
    RolloutReport,
    SampledBatch,
    SampledGroup,
    TrajectoryGroup,
)
from tests.records import make_trajectory, make_turn

finished = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=4)
"""For each report, for each group in it, whether it finished or was dropped."""


def make_group(group_id: int) -> TrajectoryGroup:
    turn = make_turn([1, 2], [group_id + 10, 3], version=group_id % 3)
    return TrajectoryGroup(group_id=group_id, task_id="t", trajectories=(make_trajectory(turn),))


def make_reports(shape: list[list[bool]]) -> list[RolloutReport]:
    group_id = 0
    reports = []
    for number, members in enumerate(shape):
        groups = []
        for is_whole in members:
            dropped = DroppedGroup(group_id=group_id, reason=DropReason.STEP_TIMEOUT)
            groups.append(make_group(group_id) if is_whole else dropped)
            group_id += 1
        counts = {"generated_tokens": float(number)}
        reports.append(RolloutReport(engine_version=number, groups=tuple(groups), counts=counts))
    return reports


@given(finished, st.randoms(use_true_random=False))
def test_each_group_finds_its_own_tokens(shape, random):
    store = {}
    headers = []
    for number, report in enumerate(make_reports(shape)):
        without, store[f"object {number}"] = split_report(report)
        placed = place_report(without, f"object {number}")
        assert (placed.engine_version, placed.counts) == (number, report.counts)
        assert [g.group_id for g in placed.groups] == [g.group_id for g in report.groups]
        assert not any(isinstance(g, TrajectoryGroup) for g in placed.groups)
        headers += [g for g in placed.groups if isinstance(g, GroupHeader)]
    random.shuffle(headers)
    batch = SampledBatch(
        lease_id=4,
        train_version=9,
        groups=tuple(SampledGroup(group=h, min_trainable_version=h.group_id) for h in headers),
    )
    placed_batch, references = place_batch(batch)
    assert len(set(references)) == len(references)
    gathered = gather_batch(placed_batch, [store[reference] for reference in references])
    assert (gathered.lease_id, gathered.train_version) == (4, 9)
    for sampled, header in zip(gathered.groups, headers, strict=True):
        assert sampled.group.group_id == header.group_id == sampled.min_trainable_version
        tokens = sampled.trajectories[0].token_ids
        np.testing.assert_array_equal(tokens, [1, 2, header.group_id + 10, 3])


def test_a_group_without_a_place_is_refused():
    groups = (SampledGroup(group=make_group(3), min_trainable_version=0),)
    with pytest.raises(TypeError, match="group 3 has no place"):
        place_batch(SampledBatch(lease_id=0, train_version=0, groups=groups))


def test_the_object_store_holds_a_full_buffer_or_half_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_groups, "SHARED_MEMORY", tmp_path)
    free = {"bytes": 64 << 30}

    def disk_usage(path):
        assert path == tmp_path
        return SimpleNamespace(free=free["bytes"])

    monkeypatch.setattr(ray_groups.shutil, "disk_usage", disk_usage)
    assert object_store_bytes(1 << 30) == 5 << 28
    assert object_store_bytes(1 << 20) == 256 << 20
    free["bytes"] = 1 << 30
    assert object_store_bytes(1 << 30) == 1 << 29
    monkeypatch.setattr(ray_groups, "SHARED_MEMORY", tmp_path / "none")
    assert object_store_bytes(1 << 30) == 5 << 28
