"""Which slot belongs to whom: free ones, and those kept for the next turn of a session."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedSlot:
    """A slot whose keys and values wait for the next turn of a session.

    Attributes:
        slot: its number.
        token_ids: whose keys and values it holds.
    """

    slot: int
    token_ids: list[int]


class SlotTable:
    """Hands out slots; the lowest free one first, then the least recently retained one."""

    def __init__(self, *, num_slots: int) -> None:
        """Start with all of ``num_slots`` slots free."""
        self._free = list(range(num_slots))
        self._retained: OrderedDict[str, RetainedSlot] = OrderedDict()

    def take(self) -> int | None:
        """Return a slot to use, evicting a session if none is free; None if all are in use."""
        if self._free:
            return heapq.heappop(self._free)
        if self._retained:
            return self._retained.popitem(last=False)[1].slot
        return None

    def put_back(self, slot: int) -> None:
        """Return a slot that was taken or claimed."""
        heapq.heappush(self._free, slot)

    def retain(self, session_id: str, slot: int, token_ids: list[int]) -> None:
        """Keep a slot in use for the next turn of its session."""
        self._retained[session_id] = RetainedSlot(slot=slot, token_ids=token_ids)

    def claim(self, session_id: str) -> RetainedSlot | None:
        """Take the slot kept for a session, if it has one."""
        return self._retained.pop(session_id, None)

    def invalidate_retained(self) -> None:
        """Forget what the retained slots hold; their sessions keep them."""
        for session_id, retained in self._retained.items():
            self._retained[session_id] = RetainedSlot(slot=retained.slot, token_ids=[])
