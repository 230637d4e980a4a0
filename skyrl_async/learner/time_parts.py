"""Where the learner says what it spends its time on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Ledger(Protocol):
    """Splits the learner's time into parts; see :class:`skyrl_async.metrics.ledger.TimeLedger`."""

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Charge the time inside the context to ``name``."""
        ...

    def detail(self, name: str) -> AbstractContextManager[Any]:
        """Show the time inside the context on the timeline, within the running part.

        On a GPU that is the time of launching the work, which goes on until a result is needed.
        """
        ...


class NullLedger:
    """A :class:`Ledger` that counts nothing."""

    __slots__ = ()

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def detail(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()
