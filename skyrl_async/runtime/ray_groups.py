"""Groups whose tokens stay in Ray's object store between the actor and the learner.

::

    rollout actor ──report with headers──► coordinator ──places──► learner
          └───────────tokens─────────► object store ──────tokens──────┘

An actor's call returns two objects, its report and the tokens of the groups in it. The coordinator
reads the first one and only keeps a reference to the other; the learner's call has that reference
among its arguments. So tokens are written once, by the actor, cross the network once, to the nodes
of the learner, and are freed when the last group of their report has left the replay buffer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl_async.types import (
    DroppedGroup,
    GroupHeader,
    RolloutReport,
    SampledBatch,
    SampledGroup,
    TrajectoryGroup,
)

MIN_STORE_BYTES = 256 << 20
SHARED_MEMORY = Path("/dev/shm")
SHARE_OF_SHARED_MEMORY = 0.5

Tokens = tuple[TrajectoryGroup, ...]
"""The finished groups of one report, in its order."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the tokens of a group are.

    Attributes:
        reference: of the object with the :data:`Tokens` of its report.
        index: of the group in there.
    """

    reference: Any
    index: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedBatch:
    """A batch on its way to the learner; its objects are arguments of their own.

    Attributes:
        lease_id: of the batch.
        train_version: of the batch.
        groups: for each group the number of its object, its index in there, and its cut-off.
    """

    lease_id: int
    train_version: int
    groups: tuple[tuple[int, int, int], ...]


def object_store_bytes(capacity_bytes: int) -> int:
    """Return the size of an object store of this machine that holds a full replay buffer.

    There is room for a quarter more, because tokens stay until all groups of their report are used.
    At most half of the shared memory that is free is asked for; what then does not fit, Ray writes
    to disk.

    Args:
        capacity_bytes: of the replay buffer.
    """
    wanted = max(MIN_STORE_BYTES, capacity_bytes + capacity_bytes // 4)
    if not SHARED_MEMORY.is_dir():
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free
    return max(MIN_STORE_BYTES, min(wanted, int(SHARE_OF_SHARED_MEMORY * free)))


def split_report(report: RolloutReport) -> tuple[RolloutReport, Tokens]:
    """Return a report with headers in place of groups, and the groups."""
    tokens = tuple(group for group in report.groups if isinstance(group, TrajectoryGroup))
    headers = tuple(
        GroupHeader.of(group) if isinstance(group, TrajectoryGroup) else group
        for group in report.groups
    )
    return replace(report, groups=headers), tokens


def place_report(report: RolloutReport, reference: Any) -> RolloutReport:
    """Return the report of :func:`split_report` with the place of its tokens in every header.

    Args:
        report: with headers.
        reference: of the object with its tokens.
    """
    placed: list[GroupHeader | DroppedGroup] = []
    index = 0
    for group in report.groups:
        if isinstance(group, GroupHeader):
            placed.append(replace(group, place=Place(reference, index)))
            index += 1
        elif isinstance(group, DroppedGroup):
            placed.append(group)
    return replace(report, groups=tuple(placed))


def place_batch(batch: SampledBatch) -> tuple[PlacedBatch, tuple[Any, ...]]:
    """Return where the tokens of a batch are, and the references of their objects.

    Raises:
        TypeError: if a group has no place.
    """
    numbers: dict[Any, int] = {}
    groups = []
    for sampled in batch.groups:
        place = sampled.group.place if isinstance(sampled.group, GroupHeader) else None
        if not isinstance(place, Place):
            raise TypeError(f"group {sampled.group.group_id} has no place: {place!r}")
        number = numbers.setdefault(place.reference, len(numbers))
        groups.append((number, place.index, sampled.min_trainable_version))
    placed = PlacedBatch(
        lease_id=batch.lease_id, train_version=batch.train_version, groups=tuple(groups)
    )
    return placed, tuple(numbers)


def gather_batch(placed: PlacedBatch, objects: Sequence[Tokens]) -> SampledBatch:
    """Return the batch with its tokens.

    Args:
        placed: of :func:`place_batch`.
        objects: that its references stand for.
    """
    return SampledBatch(
        lease_id=placed.lease_id,
        train_version=placed.train_version,
        groups=tuple(
            SampledGroup(group=objects[number][index], min_trainable_version=cut_off)
            for number, index, cut_off in placed.groups
        ),
    )
