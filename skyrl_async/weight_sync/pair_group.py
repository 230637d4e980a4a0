"""The ``torch.distributed`` group of one learner-engine pair; rank 0 sends, rank 1 receives.

Everything that depends on the backend is here: construction, deadlines, interruption. Group objects
are constructed directly, so that any number of them, and both ends of one, fit into a process.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_IN_FLIGHT = 2
_INTERRUPT_TAG = 1
RENDEZVOUS_LIMIT_S = 5.0
_SHORTEST_TIMEOUT_S = 0.01
"""Gloo counts whole milliseconds and takes 0 for no limit."""


class PairGroup:
    """Two ranks on gloo.

    Args:
        rank: 0 for the learner, 1 for the engine.
        store_address: ``(host, port)`` of the store.
        prefix: of the keys of this group; both ranks give the same, which was never used before.
        local_host: address of the interface that reaches the other rank.
        deadline: ``time.monotonic()`` at which the other rank must have joined (5 s from now at
            most).

    Raises:
        RuntimeError: if the other rank did not join.
    """

    def __init__(
        self,
        *,
        rank: int,
        store_address: tuple[str, int],
        prefix: str,
        local_host: str,
        deadline: float,
    ) -> None:
        self._peer = 1 - rank
        timeout = _timeout(min(deadline, time.monotonic() + RENDEZVOUS_LIMIT_S))
        host, port = store_address
        # A connection of its own: one that waits for a peer would block all other pairs.
        client = dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)
        gloo: Any = dist.ProcessGroupGloo  # Its type stubs lack most of it.
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=local_host)]
        options._timeout = timeout
        options._threads = _IN_FLIGHT
        self._group = gloo(dist.PrefixStore(prefix, client), rank, 2, options)

    def broadcast(
        self,
        buckets: Iterable[Tensor],
        *,
        deadline: float,
        on_bucket: Callable[[int], None] | None = None,
    ) -> None:
        """Move ``buckets`` from rank 0 to rank 1, in order, two in flight.

        Args:
            buckets: contiguous tensors, of equal sizes at both ranks.
            deadline: ``time.monotonic()`` at which the group is given up.
            on_bucket: called with the index of every bucket when it is there, in order, while the
                next one moves.

        Raises:
            RuntimeError: if the other rank is gone, the deadline passed or :meth:`interrupt` was
                called; then the group is of no further use.
        """
        moving: deque[tuple[int, Any]] = deque()
        for index, bucket in enumerate(buckets):
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            options.timeout = _timeout(deadline)
            moving.append((index, self._group.broadcast([bucket], options)))
            if len(moving) == _IN_FLIGHT:
                _finish(moving, on_bucket)
        while moving:
            _finish(moving, on_bucket)

    def interrupt(self) -> None:
        """Make pending and later broadcasts of this rank fail at once; from any thread.

        Gloo cannot cancel, but a receive that times out breaks all connections of its group.
        """
        with contextlib.suppress(RuntimeError):
            pending = self._group.recv(
                [torch.empty(1, dtype=torch.uint8)], self._peer, _INTERRUPT_TAG
            )
            pending.wait(timedelta(milliseconds=1))


def paced(
    buckets: Iterable[Tensor], max_bytes_per_s: float | None, *, deadline: float
) -> Iterator[Tensor]:
    """Yield ``buckets`` no faster than a rate; None for no limit, and none after ``deadline``."""
    due = time.monotonic()
    for bucket in buckets:
        yield bucket
        if max_bytes_per_s is not None:
            due += bucket.numel() * bucket.element_size() / max_bytes_per_s
            time.sleep(max(0.0, min(due, deadline) - time.monotonic()))


def _finish(moving: deque[tuple[int, Any]], on_bucket: Callable[[int], None] | None) -> None:
    index, work = moving.popleft()
    work.wait()
    if on_bucket is not None:
        on_bucket(index)


def _timeout(deadline: float) -> timedelta:
    return timedelta(seconds=max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic()))
