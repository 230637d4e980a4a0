"""Which of the buffered groups make the next batch.

A selector is called with the number of groups to choose from and the number wanted. The groups are
in age order: oldest policy version first, then in order of admission. It returns the positions of
the chosen ones, ascending.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Selector = Callable[[int, int], Sequence[int]]


def fifo(num_groups: int, count: int) -> Sequence[int]:
    """Choose the ``count`` oldest groups: those that go stale first."""
    del num_groups
    return range(count)


def uniform(seed: int) -> Selector:
    """Return a selector for which all groups have the same probability, without repetition.

    Args:
        seed: the same seed and the same calls give the same choices.
    """
    generator = random.Random(seed)

    def select(num_groups: int, count: int) -> Sequence[int]:
        return sorted(generator.sample(range(num_groups), count))

    return select
