"""Which engine gets the next request: plain state of the pool's members, no I/O.

One request::

    ticket = router.enter("7-0", min_version=4)
    member = await ticket.assigned            # at once, or when an engine has room
    ...                                       # member.in_flight counts it
    router.leave(member)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from skyrl_async.metrics.trace import NULL_LANE
from skyrl_async.rollout.engine_errors import EngineError
from skyrl_async.rollout.pool_meter import BusySpans
from skyrl_async.rollout.sglang_client import SglangClient
from skyrl_async.rollout.sglang_server_info import EngineLoad

_HIGH_KV_USAGE = 0.9
"""Above it the server soon retracts running requests and computes them again."""

_DECREASE = 0.75
_INCREASES = 32
"""Steps from nothing to the largest limit."""


class ConcurrencyLimit:
    """Requests that one engine is given at once: up in steps, down by a factor.

    Args:
        largest: never above it.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self.value = largest

    def observe(self, kv_usage: float, *, in_flight: int) -> None:
        """Adapt to the used part of the KV cache.

        A decrease shows only when enough requests have ended, so there is no second one before.
        """
        if kv_usage <= _HIGH_KV_USAGE:
            self.value = min(self._largest, self.value + max(1, self._largest // _INCREASES))
        elif in_flight <= self.value:
            self.value = max(1, int(in_flight * _DECREASE))


@dataclass(slots=True, eq=False)
class Member:
    """One engine of the pool.

    Attributes:
        client: talks to it.
        limit: of our requests.
        greeted: whether the server was found fit for use.
        failure: why it gets no new requests; None while it is trusted.
        in_flight: our requests on it.
        foreign: requests of others on it, when last asked.
        misses: looks at it in a row that failed.
        aborts: of our requests, under way.
        removed: set when it left the pool.
        busy: when it had requests of ours, for the timeline.
    """

    client: SglangClient
    limit: ConcurrencyLimit
    greeted: bool = False
    failure: EngineError | None = None
    in_flight: int = 0
    foreign: int = 0
    misses: int = 0
    aborts: set[asyncio.Task[None]] = field(default_factory=set)
    removed: asyncio.Event = field(default_factory=asyncio.Event)
    busy: BusySpans = field(default_factory=lambda: BusySpans(NULL_LANE))

    @property
    def engine_id(self) -> str:
        """Its name in the run."""
        return self.client.endpoint.engine_id

    @property
    def usable(self) -> bool:
        """Whether it may get new requests, room or not."""
        return self.greeted and self.failure is None and not self.removed.is_set()

    def observe(self, load: EngineLoad) -> None:
        """Take the load that the server reports."""
        self.foreign = max(0, load.running + load.waiting - self.in_flight)
        self.limit.observe(load.kv_usage, in_flight=self.in_flight)


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits for an engine; ``assigned`` gets None if it was withdrawn.

    ``queued_s`` is how long it waited; 0 if it got one at once.
    """

    session_id: str | None
    min_version: int
    assigned: asyncio.Future[Member | None]
    queued_since_s: float | None = None
    queued_s: float = 0.0


class Router:
    """Gives requests to members, the longest waiting first.

    A session stays with its engine, where its earlier turns are cached, while that has room;
    otherwise the engine with the fewest requests gets it. A request that needs ``min_version`` goes
    to engines that are at least there; only if no usable engine is, to another one.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._homes: dict[str, str] = {}
        self._waiting: list[Ticket] = []

    @property
    def num_waiting(self) -> int:
        """Requests without an engine."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests on the engines of the pool."""
        return sum(member.in_flight for member in self.members.values())

    def enter(self, session_id: str | None, *, min_version: int) -> Ticket:
        """Ask for an engine.

        Args:
            session_id: of the request's conversation, if any.
            min_version: that the engine should at least have.
        """
        assigned = asyncio.get_running_loop().create_future()
        ticket = Ticket(session_id, min_version, assigned)
        self._waiting.append(ticket)
        self.assign()
        if not assigned.done():
            ticket.queued_since_s = time.monotonic()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Let a request that still waits go on without an engine."""
        if not ticket.assigned.done():
            ticket.assigned.set_result(None)
            self._waiting.remove(ticket)

    def give_up(self, ticket: Ticket) -> None:
        """Forget a request whose caller was cancelled, perhaps just after it got its engine."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        assigned = ticket.assigned
        if assigned.done() and not assigned.cancelled() and assigned.exception() is None:
            member = assigned.result()
            if member is not None:
                self.leave(member)

    def leave(self, member: Member) -> None:
        """Say that a request left its member."""
        member.in_flight -= 1
        member.busy.request_ends(member.in_flight)
        self.assign()

    def forget(self, session_id: str) -> None:
        """Forget where a session was."""
        self._homes.pop(session_id, None)

    def assign(self) -> None:
        """Give members to those that wait; call it whenever a member may have become better."""
        still_waiting = []
        for ticket in self._waiting:
            if ticket.assigned.done():
                continue
            member = self._choose(ticket)
            if member is None:
                still_waiting.append(ticket)
                continue
            member.in_flight += 1
            member.busy.request_starts()
            if ticket.queued_since_s is not None:
                ticket.queued_s = time.monotonic() - ticket.queued_since_s
            if ticket.session_id is not None:
                self._homes[ticket.session_id] = member.engine_id
            ticket.assigned.set_result(member)
        self._waiting = still_waiting

    def fail_waiting(self, error: Exception) -> None:
        """End all waiting requests."""
        waiting, self._waiting = self._waiting, []
        for ticket in waiting:
            if not ticket.assigned.done():
                ticket.assigned.set_exception(error)

    def _choose(self, ticket: Ticket) -> Member | None:
        usable = [member for member in self.members.values() if member.usable]
        new_enough = [m for m in usable if m.client.known_version >= ticket.min_version]
        home = self._homes.get(ticket.session_id) if ticket.session_id is not None else None
        return _least_loaded(new_enough or usable, home)


def _least_loaded(members: Iterable[Member], home: str | None) -> Member | None:
    free = [member for member in members if member.in_flight < member.limit.value]
    for member in free:
        if member.engine_id == home:
            return member
    return min(free, key=lambda m: m.in_flight + m.foreign, default=None)
