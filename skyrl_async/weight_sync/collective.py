"""Weights over ``torch.distributed``, one process group per learner-engine pair.

A pair talks over a :class:`ControlChannel` (announcement, answer, acknowledgement) and moves bytes
in broadcasts of ``bucket_bytes``. An idle receiver waits in the channel, never in a collective. A
transfer that breaks costs the pair its group, and the next one makes a new group; a pair whose
engine is silent until the deadline ends. No pair waits for another.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.control_channel import ControlChannel
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.pair import Pair, PairAddress, PairListener, connect_to_sender
from skyrl_async.weight_sync.pair_group import paced
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

_MIN_ANSWER_S = 0.1
_LONGEST_TRANSFER_S = 86_400.0


class CollectiveSender:
    """The learner's end of a pair; see :class:`WeightSender`.

    Args:
        engine_id: for messages.
        store: from :func:`host_store`, shared by all senders of a learner.
        bucket_bytes: sent at once.
        host: address of the interface to listen on, reachable by the engine.
        max_bytes_per_s: send no faster; None for as fast as the network allows.

    Raises:
        ValueError: if ``bucket_bytes`` is not positive.
        OSError: if ``host`` is not an address of this machine.
    """

    def __init__(
        self,
        engine_id: str,
        *,
        store: dist.TCPStore,
        bucket_bytes: int = 1 << 20,
        host: str = "127.0.0.1",
        max_bytes_per_s: float | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}")
        self._engine_id = engine_id
        self._bucket_bytes = bucket_bytes
        self._max_bytes_per_s = max_bytes_per_s
        self._listener = PairListener(store=store, host=host)
        self.address = self._listener.address
        self._pair = Pair(self.address, rank=0)
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
        channel = self._listener.connect(self._pair, deadline=deadline)
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
        raise_refusal(channel.receive(deadline=deadline))
        # A broken broadcast is judged by the receiver, which may be alive and say what it misses.
        with contextlib.suppress(RuntimeError):
            try:
                group = self._pair.join(self._next_group, deadline=deadline)
                buckets = snapshot.flat.split(self._bucket_bytes)
                group.broadcast(
                    paced(buckets, self._max_bytes_per_s, deadline=deadline), deadline=deadline
                )
            except RuntimeError:
                self._pair.drop_group()
                raise
        moved = time.monotonic()
        try:
            raise_refusal(channel.receive(deadline=deadline))
        except TransferRejected:
            self._pair.drop_group()
            raise
        return TransferReport(
            size_bytes=snapshot.layout.size_bytes,
            transfer_s=moved - started,
            load_s=time.monotonic() - moved,
        )

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``send`` raises ``EngineLost`` at once."""
        self._listener.close()
        self._pair.close()


def raise_refusal(answer: Mapping[str, Any]) -> None:
    """Raise ``TransferRejected`` if a receiver's answer says so."""
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
        shared: stage into named shared memory, for an engine in another process.
        pinned: stage into page-locked memory, for an engine on a GPU.
    """

    def __init__(
        self,
        address: PairAddress,
        *,
        expected: WeightLayout,
        policy_version: int = -1,
        shared: bool = False,
        pinned: bool = False,
    ) -> None:
        self._pair = Pair(address, rank=1)
        self._staging = WeightStaging(
            expected, policy_version=policy_version, shared=shared, pinned=pinned
        )

    def receive(self, timeout_s: float) -> StagedWeights | None:
        """Wait for a version, stage and verify it, as :class:`WeightReceiverTransport` says."""
        try:
            channel = connect_to_sender(self._pair)
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
            channel = connect_to_sender(self._pair)
            _answer(channel, staged.deadline, error, retryable=error is not None)
        except OSError as reason:
            self.close()
            raise LearnerLost(f"the learner is lost: {type(reason).__name__}: {reason}") from reason

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``receive`` raises ``LearnerLost`` at once."""
        self._pair.close()


def _answer(
    channel: ControlChannel, deadline: float, error: str | None, *, retryable: bool = False
) -> None:
    """Answer the sender, within its deadline or at once."""
    limit = max(deadline, time.monotonic() + _MIN_ANSWER_S)
    channel.send({"error": error, "retryable": retryable}, deadline=limit)
