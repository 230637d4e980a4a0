"""Weights over ``torch.distributed``, one process group per learner-engine pair.

A pair talks over a :class:`ControlChannel` (announcement, answer, acknowledgement) and moves bytes
in broadcasts of ``bucket_bytes``. An idle receiver waits in the channel, never in a collective. A
transfer that breaks costs the pair its group, and the next one makes a new group; a pair whose
engine is silent until the deadline ends. No pair waits for another.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.control_channel import ControlChannel, hang_up, seconds_until
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.pair_group import RENDEZVOUS_LIMIT_S, PairGroup
from skyrl_async.weight_sync.snapshot import WeightSnapshot
from skyrl_async.weight_sync.staging import WeightStaging
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    StagedWeights,
    TransferRejected,
    TransferReport,
    decode_manifest,
    encode_manifest,
)

_CONNECT_TIMEOUT_S = 5.0
_HELLO_TIMEOUT_S = 1.0
_MIN_ANSWER_S = 0.1
_LONGEST_TRANSFER_S = 86_400.0


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


class _Pair:
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


class CollectiveSender:
    """The learner's end of a pair; see :class:`WeightSender`.

    Args:
        engine_id: for messages.
        store: from :func:`host_store`, shared by all senders of a learner.
        bucket_bytes: sent at once.
        host: address of the interface to listen on, reachable by the engine.

    Raises:
        ValueError: if ``bucket_bytes`` is not positive.
        OSError: if ``host`` is not an address of this machine.
    """

    def __init__(
        self,
        engine_id: str,
        *,
        store: dist.TCPStore,
        bucket_bytes: int = 8 << 20,
        host: str = "127.0.0.1",
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}")
        self._engine_id = engine_id
        self._store = store
        self._bucket_bytes = bucket_bytes
        self._listener = socket.create_server((host, 0), backlog=4)
        self.address = PairAddress(
            host=host,
            control_port=self._listener.getsockname()[1],
            store_port=store.port,
            pair_id=secrets.token_hex(16),
        )
        self._pair = _Pair(self.address, rank=0)
        self._next_group = 1
        self._sending = threading.Lock()

    def send(self, snapshot: WeightSnapshot, *, deadline: float) -> TransferReport:
        """Send ``snapshot`` and return when the engine runs it, as :class:`WeightSender` says."""
        manifest = snapshot.manifest()
        with self._sending:
            try:
                return self._send(snapshot, manifest, deadline)
            except TransferRejected:
                raise
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                self.close()
                raise EngineLost(
                    f"engine {self._engine_id!r} is lost: {type(error).__name__}: {error}"
                ) from error

    def _send(
        self, snapshot: WeightSnapshot, manifest: WeightManifest, deadline: float
    ) -> TransferReport:
        channel = self._connected(deadline)
        started = time.monotonic()
        if self._pair.group is None:
            self._next_group += 1
        announcement = {
            "manifest": encode_manifest(manifest),
            "bucket_bytes": self._bucket_bytes,
            "group_number": self._next_group,
            "remaining_s": deadline - started,
        }
        channel.send(announcement, deadline=deadline)
        _raise_refusal(channel.receive(deadline=deadline))
        # A broken broadcast is judged by the receiver, which may be alive and say what it misses.
        with contextlib.suppress(RuntimeError):
            try:
                group = self._pair.join(self._next_group, deadline=deadline)
                group.broadcast(snapshot.flat.split(self._bucket_bytes), deadline=deadline)
            except RuntimeError:
                self._pair.drop_group()
                raise
        moved = time.monotonic()
        try:
            _raise_refusal(channel.receive(deadline=deadline))
        except TransferRejected:
            self._pair.drop_group()
            raise
        return TransferReport(
            size_bytes=snapshot.layout.size_bytes,
            transfer_s=moved - started,
            load_s=time.monotonic() - moved,
        )

    def _connected(self, deadline: float) -> ControlChannel:
        """Return the channel; at first wait for the engine to connect and to name the pair."""
        while self._pair.channel is None:
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
                self._pair.set_channel(channel)
            else:
                channel.close()
        hang_up(self._listener)
        return self._pair.channel

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``send`` raises ``EngineLost`` at once."""
        hang_up(self._listener)
        self._pair.close()


def _raise_refusal(answer: dict[str, Any]) -> None:
    if answer["error"] is not None:
        raise TransferRejected(str(answer["error"]), retryable=bool(answer["retryable"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announcement:
    """What a sender says before the bytes come."""

    manifest: WeightManifest
    bucket_bytes: int
    group_number: int
    deadline: float

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> _Announcement:
        """Check a message; raises ValueError."""
        bucket_bytes: Any = message.get("bucket_bytes")
        group_number: Any = message.get("group_number")
        remaining_s: Any = message.get("remaining_s")
        for number in (bucket_bytes, group_number):
            if type(number) is not int or number < 1:
                raise ValueError(f"bucket_bytes and group_number must be >= 1, got {number!r:.50}")
        if type(remaining_s) not in (int, float) or not remaining_s > 0:
            raise ValueError(f"remaining_s must be > 0, got {remaining_s!r:.50}")
        if not isinstance(message.get("manifest"), str):
            raise ValueError("an announcement carries a manifest")
        return cls(
            manifest=decode_manifest(message["manifest"]),
            bucket_bytes=bucket_bytes,
            group_number=group_number,
            deadline=time.monotonic() + min(remaining_s, _LONGEST_TRANSFER_S),
        )


class CollectiveReceiver:
    """The engine's end of a pair; see :class:`WeightReceiverTransport`.

    Args:
        address: of the sender.
        expected: layout of the engine's parameters, ``WeightLayout.of(model.named_parameters())``.
        policy_version: that the engine runs now; -1 if its weights count for nothing.
    """

    def __init__(
        self, address: PairAddress, *, expected: WeightLayout, policy_version: int = -1
    ) -> None:
        self._pair = _Pair(address, rank=1)
        self._staging = WeightStaging(expected, policy_version=policy_version)

    def receive(self, timeout_s: float) -> StagedWeights | None:
        """Wait for a version, stage and verify it, as :class:`WeightReceiverTransport` says."""
        try:
            channel = self._connected()
            try:
                message = channel.receive(deadline=time.monotonic() + timeout_s)
            except TimeoutError:
                return None
            return self._stage(channel, message)
        except (OSError, ValueError) as error:
            self.close()
            raise LearnerLost(f"the learner is lost: {type(error).__name__}: {error}") from error

    def _stage(self, channel: ControlChannel, message: dict[str, Any]) -> StagedWeights | None:
        try:
            announced = _Announcement.parse(message)
            self._staging.admit(announced.manifest)
        except ValueError as error:
            _answer(channel, 0.0, f"malformed announcement: {error}")
            return None
        except TransferRejected as rejection:
            _answer(channel, 0.0, str(rejection), retryable=rejection.retryable)
            return None
        deadline = announced.deadline
        _answer(channel, deadline, None)
        buffer = self._staging.free_buffer()
        try:
            checksum = self._fill(buffer, announced)
            self._staging.admit(announced.manifest, checksum=checksum)
        except TransferRejected as rejection:
            _answer(channel, deadline, str(rejection), retryable=rejection.retryable)
            return None
        except RuntimeError as error:
            _answer(channel, deadline, f"the transfer was incomplete: {error}", retryable=True)
            return None
        return StagedWeights(
            policy_version=announced.manifest.policy_version,
            weights=buffer.tensors,
            deadline=deadline,
        )

    def _fill(self, buffer: FlatBuffer, announced: _Announcement) -> int:
        """Receive all buckets and return the checksum of what came."""
        group = self._pair.join(announced.group_number, deadline=announced.deadline)
        size = announced.bucket_bytes
        checksum = 0

        def add(index: int) -> None:
            nonlocal checksum
            checksum = zlib.crc32(buffer.data[index * size : (index + 1) * size], checksum)

        group.broadcast(buffer.flat.split(size), deadline=announced.deadline, on_bucket=add)
        return checksum

    def acknowledge(self, staged: StagedWeights, error: str | None) -> None:
        """Say that the engine runs ``staged``, or why not, as the protocol says."""
        if error is None:
            self._staging.commit(staged.policy_version)
        try:
            channel = self._connected()
            _answer(channel, staged.deadline, error, retryable=error is not None)
        except OSError as reason:
            self.close()
            raise LearnerLost(f"the learner is lost: {type(reason).__name__}: {reason}") from reason

    def _connected(self) -> ControlChannel:
        if self._pair.channel is None:
            address = self._pair.address
            deadline = time.monotonic() + _CONNECT_TIMEOUT_S
            channel = ControlChannel.connect(address.host, address.control_port, deadline=deadline)
            self._pair.set_channel(channel)
            channel.send({"pair_id": address.pair_id}, deadline=deadline)
        assert self._pair.channel is not None
        return self._pair.channel

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``receive`` raises ``LearnerLost`` at once."""
        self._pair.close()


def _answer(
    channel: ControlChannel, deadline: float, error: str | None, *, retryable: bool = False
) -> None:
    """Answer the sender, within its deadline or at once."""
    limit = max(deadline, time.monotonic() + _MIN_ANSWER_S)
    channel.send({"error": error, "retryable": retryable}, deadline=limit)
