"""The publisher on a virtual clock: one version on its way, and the newest one waits."""

from __future__ import annotations

from collections.abc import Callable


class VirtualPublisher:
    """Sends versions as :class:`skyrl_async.weight_sync.publisher.WeightPublisher` does.

    Args:
        num_engines: that each version goes to.
        publish_s: until an engine can exchange its weights.
        stall_s: of the exchange, after which the engine acknowledges.
        after: calls something after so many seconds.
        load: called with engine and version when an engine exchanges its weights.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        publish_s: float,
        stall_s: float,
        after: Callable[[float, Callable[[], None]], None],
        load: Callable[[int, int], None],
    ) -> None:
        self._num_engines = num_engines
        self._publish_s = publish_s
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

        def arrived() -> None:
            for engine in range(self._num_engines):
                self._load(engine, version)
            self._after(self._stall_s, self._acknowledged)

        self._after(self._publish_s, arrived)

    def _acknowledged(self) -> None:
        self._busy = False
        self._send()
