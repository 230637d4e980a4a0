import pytest

from skyrl_async.coordination.filters import FilterSettings, GroupFilter, rejection
from skyrl_async.types import DropReason, TrajectoryGroup, TrajectoryStatus
from tests.records import make_trajectory, make_turn


def group(*rewards: float, truncated: int = 0, group_id: int = 0) -> TrajectoryGroup:
    members = []
    for number, reward in enumerate(rewards):
        status = TrajectoryStatus.TRUNCATED if number < truncated else TrajectoryStatus.TERMINATED
        members.append(make_trajectory(make_turn([1, 2], [3]), reward=reward, status=status))
    return TrajectoryGroup(group_id=group_id, task_id="t", trajectories=tuple(members))


def test_nothing_is_rejected_by_default():
    assert rejection(group(1.0, 1.0, truncated=2), FilterSettings()) is None


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ((0.0, 0.0), DropReason.ZERO_VARIANCE),
        ((1.0, 1.0), DropReason.ZERO_VARIANCE),
        ((0.0, 1.0), None),
    ],
)
def test_equal_rewards_teach_nothing(rewards, reason):
    assert rejection(group(*rewards), FilterSettings(zero_variance=True)) is reason


def test_a_task_that_nearly_all_members_solve_is_rejected():
    settings = FilterSettings(max_pass_rate=0.75)
    assert rejection(group(1.0, 1.0, 1.0, 0.0), settings) is DropReason.PASS_RATE
    assert rejection(group(1.0, 1.0, 0.0, 0.0), settings) is None
    assert rejection(group(0.9, 0.9, 0.9, 0.9), settings) is None


def test_a_group_with_too_many_truncated_members_is_rejected():
    settings = FilterSettings(max_truncated_fraction=0.5)
    assert rejection(group(0.0, 1.0, truncated=2), settings) is DropReason.TRUNCATED
    assert rejection(group(0.0, 1.0, truncated=1), settings) is None


def test_after_too_many_rejections_one_group_is_kept_whatever_it_is(caplog):
    group_filter = GroupFilter(FilterSettings(zero_variance=True, max_rejected_in_a_row=3))
    with caplog.at_level("WARNING"):
        kept = [group_filter.check(group(1.0, 1.0, group_id=n)) is None for n in range(9)]
    assert kept == [False, False, False, True] * 2 + [False]
    (warning,) = caplog.messages
    assert "3 groups in a row were rejected" in warning and "(zero_variance)" in warning


def test_a_rejected_group_says_what_was_lost():
    rejected = GroupFilter(FilterSettings(zero_variance=True)).check(group(1.0, 1.0, group_id=7))
    assert rejected is not None
    assert (rejected.group_id, rejected.reason) == (7, DropReason.ZERO_VARIANCE)
    assert rejected.num_generated_tokens == 2
