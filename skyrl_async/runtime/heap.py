"""How a process that runs for hours collects its garbage.

Loading torch and transformers leaves some hundred thousand objects that live as long as the
process. A full collection looks at all of them, for a third of a second in which an actor's loop or
a learner step stands still; so they are kept out of collections. And a thousand episodes at a time
keep more objects alive than Python's default of 700 new ones between two collections is made for:
each would look again at what only waits for its tool.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

NEW_OBJECTS_PER_COLLECTION = 10_000


def freeze_heap() -> None:
    """Let later collections pass over everything that there is now, and come less often.

    What is garbage now is freed before.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS_PER_COLLECTION, *gc.get_threshold()[1:])


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Do so for the time of a context, in a process that goes on after it."""
    thresholds = gc.get_threshold()
    freeze_heap()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
