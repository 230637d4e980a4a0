"""A TCP connection that carries small JSON messages, every wait with a deadline.

Announcements and acknowledgements use it, and not the ``TCPStore`` of the process groups: a store
request to a stopped process never returns, an expired store wait prints a warning, and a store says
nothing when the other side dies, while a closed connection wakes its peer at once.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
_LENGTH_BYTES = 4


class ControlChannel:
    """One end of a connection; one thread uses it, any thread closes it.

    Args:
        connection: a connected TCP socket, which the channel then owns.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine vanished is noticed after about 25 s without a message.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._connection = connection
        self._unread = bytearray()

    @classmethod
    def connect(cls, host: str, port: int, *, deadline: float) -> ControlChannel:
        """Connect to a listening peer.

        Raises:
            OSError: if nobody listens; ``TimeoutError`` at the deadline.
        """
        return cls(socket.create_connection((host, port), timeout=seconds_until(deadline)))

    @property
    def local_host(self) -> str:
        """Address of the interface that reaches the peer."""
        return self._connection.getsockname()[0]

    def send(self, message: Mapping[str, Any], *, deadline: float) -> None:
        """Send one message.

        Raises:
            OSError: if the connection is closed; ``TimeoutError`` at the deadline, after which the
                channel must be closed.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        self._connection.settimeout(seconds_until(deadline))
        self._connection.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    def receive(self, *, deadline: float) -> dict[str, Any]:
        """Wait for one message; a message that is cut by the deadline is completed by a later call.

        Raises:
            OSError: if the connection is closed; ``TimeoutError`` at the deadline.
            ValueError: if the peer sent no JSON object, or one above 64 MiB.
        """
        self._fill(_LENGTH_BYTES, deadline)
        length = int.from_bytes(self._unread[:_LENGTH_BYTES], "big")
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}")
        end = _LENGTH_BYTES + length
        self._fill(end, deadline)
        body = bytes(self._unread[_LENGTH_BYTES:end])
        del self._unread[:end]
        message = json.loads(body)
        if not isinstance(message, dict):
            raise ValueError(f"a message must be a JSON object, got {type(message).__name__}")
        return message

    def _fill(self, num_bytes: int, deadline: float) -> None:
        while len(self._unread) < num_bytes:
            self._connection.settimeout(seconds_until(deadline))
            chunk = self._connection.recv(1 << 16)
            if not chunk:
                raise ConnectionResetError("the other side closed the connection")
            self._unread += chunk

    def close(self) -> None:
        """Close the connection; a blocked call in another thread raises ``OSError`` at once."""
        hang_up(self._connection)


def hang_up(connection: socket.socket) -> None:
    """Close a socket and wake whoever is blocked in it; a closed one is left alone."""
    with contextlib.suppress(OSError):  # Never connected, or the peer was faster.
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def seconds_until(deadline: float) -> float:
    """Return the positive number of seconds left.

    Raises:
        TimeoutError: if there are none.
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline has passed")
    return remaining
