"""Spans of the timeline around what a coroutine awaits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from skyrl_async.metrics.trace import Args, Lane


@contextlib.contextmanager
def drawn(
    lane: Lane, name: str, *, clock: Callable[[], float], args: Args | None = None
) -> Iterator[None]:
    """Record the time inside the context as a span, also if it ends with an error.

    Args:
        lane: to record it on; spans of one lane must not overlap unless one contains the other.
        name: of the span.
        clock: ``time.monotonic``.
        args: shown with it.
    """
    start_s = clock()
    try:
        yield
    finally:
        lane.span(name, start_s, clock(), args)
