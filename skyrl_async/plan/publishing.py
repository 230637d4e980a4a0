"""The publisher on a virtual clock: one version on its way, and the newest one waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial


class VirtualPublisher:
    """Sends versions as :class:`skyrl_async.weight_sync.publisher.WeightPublisher` does.

    Args:
        num_engines: that each version goes to.
        publish_s: until an engine can exchange its weights, on average.
        spread: each engine gets each version up to this part of ``publish_s`` earlier or later.
        stall_s: of the exchange; after the last engine's, the next version may be sent.
        after: calls something after so many seconds.
        load: called with engine and version when an engine exchanges its weights.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        publish_s: float,
        spread: float = 0.0,
        stall_s: float,
        after: Callable[[float, Callable[[], None]], None],
        load: Callable[[int, int], None],
    ) -> None:
        self._num_engines = num_engines
        self._publish_s = publish_s
        self._spread = spread
        self._random = random.Random(0)
        self._stall_s = stall_s
        self._after = after
        self._load = load
        self._busy = False
        self._waiting: int | None = None

    def publish(self, version: int) -> None:
        """Send a version, at once or when the one on its way has arrived."""
        self._waiting = version
        if not self._busy:
            self._send()

    def _send(self) -> None:
        version, self._waiting = self._waiting, None
        if version is None:
            return
        self._busy = True
        left = set(range(self._num_engines))

        def arrived(engine: int) -> None:
            self._load(engine, version)
            left.remove(engine)
            if not left:
                self._after(self._stall_s, self._acknowledged)

        for engine in range(self._num_engines):
            self._after(self._delay_s(), partial(arrived, engine))

    def _delay_s(self) -> float:
        if not self._spread:
            return self._publish_s
        return self._publish_s * self._random.uniform(1 - self._spread, 1 + self._spread)

    def _acknowledged(self) -> None:
        self._busy = False
        self._send()
