"""Publishing in the background: the learner hands over a snapshot and trains on.

One version is in flight. A newer one waits for it, and replaces a version that waits already. Every
engine is served by a thread of its own, so a slow one delays the others at most until the deadline,
and a dead one is given up there.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from skyrl_async.metrics.trace import NULL_TRACER, Args, Lane, Tracing
from skyrl_async.weight_sync.snapshot import WeightSnapshot
from skyrl_async.weight_sync.transport import EngineLost, TransferRejected, WeightSender

_ATTEMPTS = 2
_GRACE_S = 0.5
"""A sender that overruns its deadline by more is given up without waiting for it."""


class EngineStatus(StrEnum):
    """What became of one version at one engine."""

    LOADED = "loaded"
    """The engine runs it."""
    REJECTED = "rejected"
    """The engine kept its old version and stays in the pool."""
    LOST = "lost"
    """The engine is gone; its sender is closed and forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvent:
    """One version at one engine.

    Attributes:
        engine_id: as given with its sender.
        policy_version: that was sent.
        status: what became of it.
        detail: why, unless it was loaded.
        size_bytes: moved, if it was loaded.
        transfer_s: seconds of moving them.
        load_s: seconds of verifying and loading.
    """

    engine_id: str
    policy_version: int
    status: EngineStatus
    detail: str = ""
    size_bytes: int = 0
    transfer_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishStats:
    """What was published since the previous call of ``take_stats``.

    Attributes:
        num_publishes: versions sent.
        versions_skipped: replaced by a newer one before they were sent.
        size_bytes: sent to all engines together.
        transfer_s: seconds in which a version was on its way, until its last engine.
        num_rejections: versions that an engine refused, also after another attempt.
        lost_engines: in the order of their loss.
    """

    num_publishes: int = 0
    versions_skipped: int = 0
    size_bytes: int = 0
    transfer_s: float = 0.0
    num_rejections: int = 0
    lost_engines: tuple[str, ...] = ()


class WeightPublisher:
    """Sends the newest snapshot to all engines.

    Args:
        senders: one per engine, by its id; the publisher closes them.
        timeout_s: an engine that has not acknowledged a version by then is lost.
        on_event: called in the publisher's thread; an exception in it ends the publisher.
        cpus: that the publisher's threads may use; None leaves them as they are.
        tracer: gets a lane for each engine.

    Raises:
        ValueError: if ``timeout_s`` is not positive.
    """

    def __init__(
        self,
        senders: Mapping[str, WeightSender],
        *,
        timeout_s: float,
        on_event: Callable[[EngineEvent], None] | None = None,
        cpus: Collection[int] | None = None,
        tracer: Tracing = NULL_TRACER,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
        self._senders = dict(senders)
        self._versions = dict.fromkeys(self._senders, -1)
        self._timeout_s = timeout_s
        self._on_event = on_event
        self._cpus = cpus
        self._tracer = tracer
        self._lanes: dict[str, Lane] = {}
        self._changed = threading.Condition()
        self._waiting: WeightSnapshot | None = None
        self._busy = False
        self._closed = False
        self._newest_version = -1
        self._error: BaseException | None = None
        self._skipped = 0
        self._num_publishes = 0
        self._transfer_s = 0.0
        self._events: list[EngineEvent] = []
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    def publish(self, snapshot: WeightSnapshot) -> None:
        """Send ``snapshot`` as soon as the one in flight has ended; returns at once.

        The publisher releases it, also when this raises. A version that an engine runs already is
        not sent to it again, so the same one may be published for the sake of a new engine.

        Raises:
            ValueError: if its version is below an earlier one.
            RuntimeError: if the publisher has died or was closed.
        """
        try:
            self.check()
            with self._changed:
                if self._closed:
                    raise RuntimeError("the weight publisher is closed")
                version = snapshot.policy_version
                if version < self._newest_version:
                    raise ValueError(
                        f"policy version {version} cannot follow {self._newest_version}"
                    )
                self._newest_version = version
                replaced, self._waiting = self._waiting, snapshot
                self._skipped += replaced is not None
                self._changed.notify_all()
        except (ValueError, RuntimeError):
            snapshot.release()
            raise
        if replaced is not None:
            replaced.release()

    def check(self) -> None:
        """Do nothing while the publisher works.

        Raises:
            RuntimeError: from the exception that ended it.
        """
        if self._error is not None:
            raise RuntimeError(f"the weight publisher died: {self._error!r}") from self._error

    @property
    def engine_versions(self) -> dict[str, int]:
        """Version that each engine of the pool has acknowledged, -1 for none."""
        with self._changed:
            return dict(self._versions)

    def add_engine(self, engine_id: str, sender: WeightSender) -> None:
        """Serve another engine, or one that came back, from the next version on.

        Raises:
            ValueError: if the id is in use.
        """
        with self._changed:
            if engine_id in self._senders:
                raise ValueError(f"engine {engine_id!r} is served already; remove it first")
            self._senders[engine_id] = sender
            self._versions[engine_id] = -1

    def remove_engine(self, engine_id: str) -> None:
        """Close the sender of an engine and forget it; unknown ids are ignored."""
        with self._changed:
            sender = self._senders.pop(engine_id, None)
            self._versions.pop(engine_id, None)
        if sender is not None:
            sender.close()

    def take_stats(self) -> PublishStats:
        """Return what happened since the previous call."""
        with self._changed:
            events, self._events = self._events, []
            skipped, self._skipped = self._skipped, 0
            publishes, self._num_publishes = self._num_publishes, 0
            seconds, self._transfer_s = self._transfer_s, 0.0
        return PublishStats(
            num_publishes=publishes,
            versions_skipped=skipped,
            size_bytes=sum(event.size_bytes for event in events),
            transfer_s=seconds,
            num_rejections=sum(event.status is EngineStatus.REJECTED for event in events),
            lost_engines=tuple(e.engine_id for e in events if e.status is EngineStatus.LOST),
        )

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight or waiting; return whether that came in time.

        Raises:
            RuntimeError: if the publisher has died.
        """
        with self._changed:
            idle = self._changed.wait_for(
                lambda: self._error or not (self._busy or self._waiting), timeout_s
            )
        self.check()
        return bool(idle)

    def close(self, timeout_s: float = 1.0) -> None:
        """End all pairs and the threads, also in the middle of a transfer; idempotent."""
        with self._changed:
            self._closed = True
            senders = list(self._senders.values())
            waiting, self._waiting = self._waiting, None
            self._changed.notify_all()
        if waiting is not None:
            waiting.release()
        for sender in senders:
            sender.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            if self._cpus is not None:
                # The senders' threads, and those of their groups, inherit it.
                os.sched_setaffinity(0, self._cpus)
            while (snapshot := self._next()) is not None:
                try:
                    self._send_to_all(snapshot)
                finally:
                    snapshot.release()
                    with self._changed:
                        self._busy = False
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                waiting, self._waiting = self._waiting, None
                self._changed.notify_all()
            if waiting is not None:
                waiting.release()

    def _next(self) -> WeightSnapshot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            if self._closed:
                return None
            snapshot, self._waiting = self._waiting, None
            self._busy = True
            return snapshot

    def _send_to_all(self, snapshot: WeightSnapshot) -> None:
        started = time.monotonic()
        deadline = started + self._timeout_s
        snapshot.manifest()
        with self._changed:
            targets = {
                engine_id: sender
                for engine_id, sender in self._senders.items()
                if self._versions[engine_id] < snapshot.policy_version
            }
        results: queue.SimpleQueue[EngineEvent | BaseException] = queue.SimpleQueue()
        threads = {
            engine_id: threading.Thread(
                target=_send_to_one,
                args=(engine_id, sender, snapshot, deadline, results, self._lane(engine_id)),
                name=f"weight-sender-{engine_id}",
                daemon=True,
            )
            for engine_id, sender in targets.items()
        }
        for thread in threads.values():
            thread.start()
        self._collect(targets, snapshot.policy_version, deadline + _GRACE_S, results)
        for thread in threads.values():
            thread.join(max(0.0, deadline + _GRACE_S - time.monotonic()))
        with self._changed:
            self._num_publishes += 1
            self._transfer_s += time.monotonic() - started

    def _lane(self, engine_id: str) -> Lane:
        if engine_id not in self._lanes:
            name = f"transfer to {engine_id}"
            self._lanes[engine_id] = self._tracer.lane(role="publisher", name=name)
        return self._lanes[engine_id]

    def _collect(
        self,
        targets: Mapping[str, WeightSender],
        policy_version: int,
        limit: float,
        results: queue.SimpleQueue[EngineEvent | BaseException],
    ) -> None:
        """Settle the result of every target; those without one at ``limit`` are lost."""
        pending = dict(targets)
        while pending:
            try:
                event = results.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(event, BaseException):
                raise event
            self._settle(event, pending.pop(event.engine_id))
        for engine_id, sender in pending.items():
            detail = f"engine {engine_id!r} is lost: its sender overran the deadline"
            sender.close()
            self._settle(
                EngineEvent(
                    engine_id=engine_id,
                    policy_version=policy_version,
                    status=EngineStatus.LOST,
                    detail=detail,
                ),
                sender,
            )

    def _settle(self, event: EngineEvent, sender: WeightSender) -> None:
        with self._changed:
            if self._closed or self._senders.get(event.engine_id) is not sender:
                return
            self._events.append(event)
            if event.status is EngineStatus.LOADED:
                self._versions[event.engine_id] = event.policy_version
            elif event.status is EngineStatus.LOST:
                del self._senders[event.engine_id], self._versions[event.engine_id]
        if self._on_event is not None:
            self._on_event(event)


def _send_to_one(
    engine_id: str,
    sender: WeightSender,
    snapshot: WeightSnapshot,
    deadline: float,
    results: queue.SimpleQueue[EngineEvent | BaseException],
    lane: Lane,
) -> None:
    """Put one event, or the exception of a broken sender, into ``results``."""
    version = snapshot.policy_version
    started_s = time.monotonic()
    lane.flow("sent", policy_version=version, time_s=started_s, engine=engine_id)
    try:
        event = _attempt(engine_id, sender, snapshot, deadline)
    except BaseException as error:
        results.put(error)
        return
    args: Args = {
        "policy_version": version,
        "size_bytes": event.size_bytes,
        "status": event.status.value,
    }
    lane.span("transfer", started_s, time.monotonic(), args)
    results.put(event)


def _attempt(
    engine_id: str, sender: WeightSender, snapshot: WeightSnapshot, deadline: float
) -> EngineEvent:
    """Send, once more if the engine asks for it and there is time."""
    version = snapshot.policy_version
    status, detail = EngineStatus.REJECTED, ""
    for _ in range(_ATTEMPTS):
        try:
            report = sender.send(snapshot, deadline=deadline)
        except EngineLost as error:
            status, detail = EngineStatus.LOST, str(error)
            break
        except TransferRejected as error:
            detail = str(error)
            if not error.retryable:
                break
        else:
            return EngineEvent(
                engine_id=engine_id,
                policy_version=version,
                status=EngineStatus.LOADED,
                size_bytes=report.size_bytes,
                transfer_s=report.transfer_s,
                load_s=report.load_s,
            )
    return EngineEvent(engine_id=engine_id, policy_version=version, status=status, detail=detail)
