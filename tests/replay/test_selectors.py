from __future__ import annotations

from collections import Counter

import pytest

from skyrl_async.replay.selectors import fifo, uniform


def test_fifo_takes_the_oldest():
    assert list(fifo(10, 3)) == [0, 1, 2]


def test_uniform_is_repeatable_and_without_repetition():
    one, other = uniform(3), uniform(3)

    chosen = [one(20, 8) for _ in range(5)]

    assert chosen == [other(20, 8) for _ in range(5)]
    for positions in chosen:
        assert positions == sorted(set(positions))
        assert set(positions) <= set(range(20))
    assert len({tuple(positions) for positions in chosen}) == 5


def test_uniform_takes_every_position_equally_often():
    selector = uniform(0)

    counts = Counter(position for _ in range(4000) for position in selector(10, 3))

    expected = 4000 * 3 / 10
    assert max(abs(counts[position] - expected) for position in range(10)) < 4 * expected**0.5


def test_uniform_cannot_choose_more_than_there_are():
    with pytest.raises(ValueError):
        uniform(0)(2, 3)
