"""Errors that name who failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class WorkerFailed(Exception):
    """A worker or a loop of the run ended with an error; the message begins with its name."""


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
    """Put the name of a worker or loop before the text of an error that has none yet."""
    try:
        yield
    except WorkerFailed:
        raise
    except Exception as error:
        raise WorkerFailed(f"{name}: {error}" if str(error) else f"{name}: {error!r}") from error
