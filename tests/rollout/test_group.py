from __future__ import annotations

import asyncio

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.rollout.group import play_group
from skyrl_async.types import Assignment, DroppedGroup, DropReason, Task, TrajectoryGroup
from tests.records import make_trajectory, make_turn

ASSIGNMENT = Assignment(group_id=7, task=Task(task_id="t/7", environment="e", seed=1))
DEADLINE_S = 5.0


def played(play_member, *, group_size: int):
    async def body():
        async with asyncio.timeout(DEADLINE_S):
            return await play_group(ASSIGNMENT, group_size=group_size, play_member=play_member)

    return asyncio.run(body())


def member(number: int):
    return make_trajectory(make_turn([1], [2] * (number + 1)), reward=float(number))


def failing(*reasons: DropReason | None):
    """Members by number: None finishes, a reason fails."""

    async def play_member(assignment, number):
        assert assignment is ASSIGNMENT
        reason = reasons[number]
        if reason is not None:
            raise EnvironmentFailure(reason, f"member {number}")
        return member(number)

    return play_member


def test_all_members_play_the_same_assignment():
    group = played(failing(None, None, None), group_size=3)

    assert isinstance(group, TrajectoryGroup)
    assert (group.group_id, group.task_id, group.failures) == (7, "t/7", ())
    assert [t.reward for t in group.trajectories] == [0.0, 1.0, 2.0]


def test_failing_member_does_not_sink_its_siblings():
    failed = asyncio.Event()

    async def play_member(assignment, number):
        if number == 1:
            failed.set()
            raise EnvironmentFailure(DropReason.STEP_TIMEOUT, "too slow")
        await failed.wait()
        return member(number)

    group = played(play_member, group_size=3)

    assert isinstance(group, TrajectoryGroup)
    assert [t.reward for t in group.trajectories] == [0.0, 2.0]
    assert group.failures == (DropReason.STEP_TIMEOUT,)


def test_members_play_at_the_same_time():
    playing: set[int] = set()
    all_play = asyncio.Event()

    async def play_member(assignment, number):
        playing.add(number)
        if len(playing) == 4:
            all_play.set()
        await all_play.wait()
        return member(number)

    group = played(play_member, group_size=4)

    assert isinstance(group, TrajectoryGroup)
    assert len(group.trajectories) == 4


ERROR, TIMEOUT = DropReason.ENVIRONMENT_ERROR, DropReason.EPISODE_TIMEOUT


@pytest.mark.parametrize(
    ("reasons", "expected", "detail", "lost_tokens"),
    [
        ((ERROR, ERROR, ERROR), ERROR, "member 0", 0),
        ((None, TIMEOUT, TIMEOUT), TIMEOUT, "member 1", 1),
        ((ERROR, None, TIMEOUT), DropReason.TOO_FEW_MEMBERS, "member 0", 2),
        ((TIMEOUT, ERROR, ERROR), DropReason.TOO_FEW_MEMBERS, "member 0", 0),
    ],
)
def test_fewer_than_two_members_drop_the_group(reasons, expected, detail, lost_tokens):
    group = played(failing(*reasons), group_size=3)

    assert group == DroppedGroup(
        group_id=7,
        reason=expected,
        failures=tuple(r for r in reasons if r is not None),
        num_generated_tokens=lost_tokens,
        detail=detail,
    )


def test_programming_error_propagates():
    async def play_member(assignment, number):
        if number == 0:
            raise EnvironmentFailure(DropReason.STEP_TIMEOUT, "too slow")
        if number == 2:
            raise ZeroDivisionError("a bug")
        return member(number)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        played(play_member, group_size=4)


def test_cancelling_the_group_cancels_its_members():
    started: set[int] = set()
    ended: set[int] = set()
    all_started = asyncio.Event()

    async def play_member(assignment, number):
        started.add(number)
        if len(started) == 3:
            all_started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.add(number)

    async def body():
        async with asyncio.timeout(DEADLINE_S):
            playing = asyncio.create_task(
                play_group(ASSIGNMENT, group_size=3, play_member=play_member)
            )
            await all_started.wait()
            playing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await playing
        assert ended == {0, 1, 2}

    asyncio.run(body())
