"""One learner-engine pair: how its ends find each other, and how any thread ends it."""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from skyrl_async.weight_sync.control_channel import ControlChannel, hang_up, seconds_until
from skyrl_async.weight_sync.pair_group import RENDEZVOUS_LIMIT_S, PairGroup

_CONNECT_TIMEOUT_S = 5.0
_HELLO_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAddress:
    """How a receiver finds its sender; picklable, and as secret as the weights.

    Attributes:
        host: address of the learner.
        control_port: where its sender listens.
        store_port: where the pair's groups meet.
        pair_id: unguessable name of the pair, never used again.
    """

    host: str
    control_port: int
    store_port: int
    pair_id: str


def host_store(host: str = "127.0.0.1", port: int = 0) -> dist.TCPStore:
    """Host the store at which pairs meet; keep the object as long as pairs may be made.

    Args:
        host: address of the interface to listen on, and on no other.
        port: 0 chooses a free one; see the result's ``port``.
    """
    listener = socket.create_server((host, port))
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=RENDEZVOUS_LIMIT_S),
        # Left alone, a TCPStore listens on all interfaces.
        master_listen_fd=listener.detach(),
    )


class Pair:
    """Channel and group of one side, and their end, which any thread may bring."""

    def __init__(self, address: PairAddress, *, rank: int) -> None:
        self.address = address
        self.channel: ControlChannel | None = None
        self.group: PairGroup | None = None
        self.group_number = 0
        self._rank = rank
        self._closed = False
        self._lock = threading.Lock()

    def set_channel(self, channel: ControlChannel) -> None:
        """Keep ``channel``, or close it if the pair has ended."""
        with self._lock:
            if not self._closed:
                self.channel = channel
                return
        channel.close()
        raise ConnectionAbortedError("the pair was closed on this side")

    def join(self, number: int, *, deadline: float) -> PairGroup:
        """Return group ``number`` of the pair; meet the other side in it if it is new."""
        if self.group is not None and self.group_number == number:
            return self.group
        self.drop_group()
        assert self.channel is not None
        group = PairGroup(
            rank=self._rank,
            store_address=(self.address.host, self.address.store_port),
            prefix=f"{self.address.pair_id}/{number}",
            local_host=self.channel.local_host,
            deadline=deadline,
        )
        with self._lock:
            if not self._closed:
                self.group, self.group_number = group, number
                return group
        group.interrupt()
        raise ConnectionAbortedError("the pair was closed on this side")

    def drop_group(self) -> None:
        """Give up the group; the other side's pending broadcasts fail."""
        with self._lock:
            group, self.group = self.group, None
        if group is not None:
            group.interrupt()

    def close(self) -> None:
        """End the pair and wake whoever is blocked in it."""
        with self._lock:
            self._closed = True
            channel = self.channel
        if channel is not None:
            channel.close()
        self.drop_group()


class PairListener:
    """The learner's end of a pair before its engine has connected.

    Args:
        store: from :func:`host_store`, shared by all pairs of a learner.
        host: address of the interface to listen on, reachable by the engine.

    Raises:
        OSError: if ``host`` is not an address of this machine.
    """

    def __init__(self, *, store: dist.TCPStore, host: str) -> None:
        self._store = store
        self._listener = socket.create_server((host, 0), backlog=4)
        self.address = PairAddress(
            host=host,
            control_port=self._listener.getsockname()[1],
            store_port=store.port,
            pair_id=secrets.token_hex(16),
        )

    def connect(self, pair: Pair, *, deadline: float) -> ControlChannel:
        """Return the pair's channel; at first wait for the engine to connect and to name the pair.

        Raises:
            OSError: if the pair was closed; ``TimeoutError`` at the deadline.
        """
        while pair.channel is None:
            self._listener.settimeout(seconds_until(deadline))
            connection, _ = self._listener.accept()
            channel = ControlChannel(connection)
            try:
                hello = channel.receive(deadline=min(deadline, time.monotonic() + _HELLO_TIMEOUT_S))
                known = hmac.compare_digest(
                    str(hello.get("pair_id")).encode(), self.address.pair_id.encode()
                )
            except (OSError, ValueError):
                known = False
            if known:
                pair.set_channel(channel)
            else:
                channel.close()
        self.close()
        return pair.channel

    def close(self) -> None:
        """Stop listening; a blocked ``connect`` raises ``OSError`` at once."""
        hang_up(self._listener)


def connect_to_sender(pair: Pair) -> ControlChannel:
    """Return the channel of the engine's end of a pair; connect and name the pair at first.

    Raises:
        OSError: if the sender is gone or the pair was closed; ``TimeoutError`` after five seconds.
    """
    if pair.channel is None:
        address = pair.address
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        channel = ControlChannel.connect(address.host, address.control_port, deadline=deadline)
        pair.set_channel(channel)
        channel.send({"pair_id": address.pair_id}, deadline=deadline)
    assert pair.channel is not None
    return pair.channel
