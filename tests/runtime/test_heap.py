import gc

import pytest

from skyrl_async.runtime.heap import frozen_heap


class Node:
    """Something that can be garbage: it holds on to itself."""

    def __init__(self) -> None:
        self.me = self


def test_collections_pass_over_what_was_there_before():
    kept = Node()
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()
    with frozen_heap():
        assert gc.get_threshold() == (10_000, *thresholds[1:])
        assert gc.get_freeze_count() > before
        assert not any(one is kept for one in gc.get_objects())
        new = Node()
        assert any(one is new for one in gc.get_objects())
    assert any(one is kept for one in gc.get_objects())
    assert gc.get_threshold() == thresholds


def test_the_heap_is_as_before_when_a_run_fails():
    kept = Node()
    with pytest.raises(RuntimeError, match="failed"), frozen_heap():
        raise RuntimeError("failed")
    assert any(one is kept for one in gc.get_objects())
