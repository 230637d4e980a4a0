"""Versions are published exactly ``lag`` versions late, in order, and each is released once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.lab.late_publishing import LatePublishing


class Weights:
    def __init__(self, policy_version: int) -> None:
        self.policy_version = policy_version
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


@settings(max_examples=50, deadline=None)
@given(lag=st.integers(0, 20), count=st.integers(1, 60))
def test_the_newest_published_version_is_lag_behind_the_newest_made(lag: int, count: int):
    published: list[Weights] = []
    late = LatePublishing(published.append, lag=lag)
    for version in range(1, count + 1):
        late.publish(Weights(version))
        assert [w.policy_version for w in published] == list(range(1, version - lag + 1))


def test_closing_releases_what_was_held_and_only_that():
    published: list[Weights] = []
    late = LatePublishing(published.append, lag=2)
    made = [Weights(version) for version in range(1, 6)]
    for weights in made:
        late.publish(weights)
    late.close()
    late.close()
    assert [w.num_releases for w in made] == [0, 0, 0, 1, 1]


def test_a_skipped_version_does_not_hold_the_others_back():
    published: list[Weights] = []
    late = LatePublishing(published.append, lag=2)
    for version in (1, 2, 5):
        late.publish(Weights(version))
    assert [w.policy_version for w in published] == [1, 2]


def test_a_version_that_does_not_rise_is_refused_and_released():
    late = LatePublishing(lambda _: None, lag=3)
    late.publish(Weights(4))
    again = Weights(4)
    with pytest.raises(ValueError, match="policy version 4 cannot follow 4"):
        late.publish(again)
    assert again.num_releases == 1


def test_a_negative_lag_is_refused():
    with pytest.raises(ValueError, match="lag must be >= 0, got -1"):
        LatePublishing(lambda _: None, lag=-1)
