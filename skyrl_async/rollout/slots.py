"""Where the wall time of an actor's slots goes, in named parts that add up to all of it.

A slot is what one trajectory of a group occupies until its whole group has ended. An actor has as
many as it ever played at once; one that plays nothing waits for admission.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol

from skyrl_async.metrics.trace import NULL_TRACER, Lane, Tracing

PARTS = ("wait_admission", "wait_group", "wait_engine", "other", "environment", "generate")
"""Of a slot's time; ``other`` is the actor's own work, such as turning text into tokens."""

_WAIT_ADMISSION, _WAIT_GROUP, _WAIT_ENGINE, _OTHER, _ENVIRONMENT, _GENERATE = range(len(PARTS))


class EpisodeClock(Protocol):
    """Told what an episode does now; each state lasts until the next call."""

    def works(self) -> None:
        """The actor prepares something."""
        ...

    def in_environment(self) -> None:
        """The environment is called."""
        ...

    def generates(self) -> None:
        """The engine has a request."""
        ...

    def generated(self, num_tokens: int, *, queued_s: float) -> None:
        """The engine has answered, and the environment is next.

        Args:
            num_tokens: of the reply.
            queued_s: before the engine took the request.
        """
        ...


class Slots:
    """Counts the time of all slots of one actor; costs the same for any number of them.

    ::

        slot = slots.open()          # before an episode
        slot.generates()             # and so on, see EpisodeClock
        slot.ends()                  # its episode; the others of the group go on
        slot.close()                 # its group
        seconds = slots.take()       # by part, since the last call

    Belongs to one asyncio loop.

    Args:
        tracer: gets a lane for each of the first slots.
        num_drawn: slots that get one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        tracer: Tracing = NULL_TRACER,
        num_drawn: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.since_s = clock()
        # Time of a part = moments of leaving it - moments of entering it + now for who is in it.
        self.charged_s = [0.0] * len(PARTS)
        self.counts = [0] * len(PARTS)
        self.queued_s = 0.0
        self._lanes: list[Lane | None] = []
        self._free: list[int] = []
        self._tracer = tracer
        self._num_drawn = num_drawn

    def open(self) -> Slot:
        """Return a slot for one more trajectory: the lowest free one, or a new one."""
        if self._free:
            index, before = heapq.heappop(self._free), _WAIT_ADMISSION
        else:
            index, before = len(self._lanes), None
            self._lanes.append(self._new_lane(index))
        return Slot(self, index=index, lane=self._lanes[index], before=before)

    def put_back(self, index: int) -> None:
        """Say that a slot plays nothing."""
        heapq.heappush(self._free, index)

    def take(self) -> dict[str, float]:
        """Return the seconds of every part since the last call, of all slots together."""
        now_s = self.clock()
        passed_s = now_s - self.since_s
        seconds = {
            part: max(0.0, charged + count * passed_s)
            for part, charged, count in zip(PARTS, self.charged_s, self.counts, strict=True)
        }
        # Known only when a reply comes, and part of its time may have been taken before.
        queued_s = min(self.queued_s, seconds["generate"])
        self.queued_s -= queued_s
        seconds["generate"] -= queued_s
        seconds["wait_engine"] += queued_s
        self.charged_s = [0.0] * len(PARTS)
        self.since_s = now_s
        return seconds

    def _new_lane(self, index: int) -> Lane | None:
        if index >= self._num_drawn:
            return None
        return self._tracer.lane(role="slot", name=f"slot {index}", parts=PARTS)


class Slot:
    """One slot, from the start of a trajectory until its group has ended; see :class:`Slots`."""

    __slots__ = ("_ends", "_index", "_lane", "_part", "_since_s", "_slots", "_started_s")

    def __init__(self, slots: Slots, *, index: int, lane: Lane | None, before: int | None) -> None:
        self._slots = slots
        self._index = index
        self._lane = lane
        self._ends: list[float] = []
        self._part = _OTHER
        self._started_s = self._since_s = now_s = slots.clock()
        offset_s = now_s - slots.since_s
        if before is not None:
            slots.charged_s[before] += offset_s
            slots.counts[before] -= 1
        slots.charged_s[_OTHER] -= offset_s
        slots.counts[_OTHER] += 1

    def works(self) -> None:
        """The actor prepares something."""
        self._switch(_OTHER)

    def in_environment(self) -> None:
        """The environment is called."""
        self._switch(_ENVIRONMENT)

    def generates(self) -> None:
        """The engine has a request."""
        self._switch(_GENERATE)

    def generated(self, num_tokens: int, *, queued_s: float) -> None:
        """The engine has answered, and the environment is next."""
        if queued_s > 0:
            self._slots.queued_s += queued_s
            if self._lane is not None:
                self._ends += (_WAIT_ENGINE, self._since_s + queued_s, 0)
        self._switch(_ENVIRONMENT, num_tokens)

    def ends(self) -> None:
        """The trajectory is over, whole or not."""
        self._switch(_WAIT_GROUP)

    def close(self) -> None:
        """The group is over."""
        self._switch(_WAIT_ADMISSION)
        if self._lane is not None:
            self._lane.chain(self._started_s, self._ends)
        self._slots.put_back(self._index)

    def _switch(self, part: int, value: int = 0) -> None:
        slots, before = self._slots, self._part
        now_s = slots.clock()
        offset_s = now_s - slots.since_s
        charged, counts = slots.charged_s, slots.counts
        charged[before] += offset_s
        charged[part] -= offset_s
        counts[before] -= 1
        counts[part] += 1
        if self._lane is not None:
            self._ends += (before, now_s, value)
        self._part = part
        self._since_s = now_s


class NullSlot:
    """An :class:`EpisodeClock` that counts nothing."""

    __slots__ = ()

    def works(self) -> None:
        """Do nothing."""

    def in_environment(self) -> None:
        """Do nothing."""

    def generates(self) -> None:
        """Do nothing."""

    def generated(self, num_tokens: int, *, queued_s: float) -> None:
        """Do nothing."""


NULL_SLOT = NullSlot()
