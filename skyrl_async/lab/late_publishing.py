"""Publishing every version late, so that engines are a fixed number of versions behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Snapshot(Protocol):
    """The weights of one version, to be released once; see ``weight_sync/snapshot.py``."""

    @property
    def policy_version(self) -> int:
        """Of the weights."""
        ...

    def release(self) -> None:
        """Give the memory back."""
        ...


S = TypeVar("S", bound=Snapshot)


class LatePublishing(Generic[S]):
    """Holds each version back until the learner has made ``lag`` further ones.

    While the learner is at version ``v`` the newest version published is ``v - lag``; until the
    learner has made ``lag + 1`` versions nothing is, and engines keep the initial weights.

    Args:
        publish: takes a snapshot that is due, and releases it.
        lag: versions.

    Raises:
        ValueError: if ``lag`` is negative.
    """

    def __init__(self, publish: Callable[[S], None], *, lag: int) -> None:
        if lag < 0:
            raise ValueError(f"lag must be >= 0, got {lag}")
        self._publish = publish
        self._lag = lag
        self._held: deque[S] = deque()

    def publish(self, snapshot: S) -> None:
        """Take the learner's newest version, and publish those that are due by it.

        Raises:
            ValueError: if its version is not above the one before; it is then released.
        """
        if self._held and snapshot.policy_version <= self._held[-1].policy_version:
            newest = self._held[-1].policy_version
            snapshot.release()
            raise ValueError(
                f"policy version {snapshot.policy_version} cannot follow {newest} in a ring of "
                "weights with an exact lag"
            )
        self._held.append(snapshot)
        due = snapshot.policy_version - self._lag
        while self._held and self._held[0].policy_version <= due:
            self._publish(self._held.popleft())

    def close(self) -> None:
        """Release what is held; idempotent."""
        while self._held:
            self._held.popleft().release()
