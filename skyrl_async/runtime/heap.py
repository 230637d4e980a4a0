"""What was loaded before a run is kept out of its garbage collections.

Loading torch and transformers leaves some hundred thousand objects that live as long as the
process. A full collection looks at all of them, for a third of a second in which an actor's loop or
a learner step stands still.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def freeze_heap() -> None:
    """Let later collections pass over everything that there is now; garbage is freed before."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Do so for the time of a context, in a process that goes on after it."""
    freeze_heap()
    try:
        yield
    finally:
        gc.unfreeze()
