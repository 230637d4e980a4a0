"""Weights broadcast straight into a paused SGLang server: pause, transfer, resume.

It needs no memory beside the engine, and the engine stands still while the bytes travel, so its
stall grows with the size over the network's rate; the staged ways in ``sglang_loader`` stop the
engine for a local copy only. The bytes reach the server unseen by us: their checksum is not
verified.

The learner is rank 0 and the server rank 1 of a group of the pair's own. The worker beside the
server speaks for it: it checks the manifest and makes the HTTP calls, so that the admin key never
leaves its machine::

    learner                             worker beside the server            server
    manifest, buckets, group  ------->  check, answer
                              <-------  pause, join the group  ---------->  rank 1
    rank 0: broadcast         ===========================================>  bucket by bucket
                              <-------  end, resume, acknowledge
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_async.weight_sync.collective import raise_refusal
from skyrl_async.weight_sync.control_channel import ControlChannel
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.pair import Pair, PairAddress, PairListener, connect_to_sender
from skyrl_async.weight_sync.pair_group import PairGroup, paced
from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from skyrl_async.weight_sync.sglang_loader import LoadReport, SglangLoader
from skyrl_async.weight_sync.snapshot import WeightSnapshot
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    StagedWeights,
    TransferRejected,
    TransferReport,
    decode_manifest,
    encode_manifest,
    verify,
)

_LOOPBACK = "127.0.0.1"
_LEAVE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAddress:
    """How a worker finds the sender of a direct pair; picklable, and as secret as the weights."""

    pair: PairAddress


class DirectSender:
    """The learner's end of a direct pair; see :class:`WeightSender`.

    Args:
        engine_id: for messages.
        store: from :func:`host_store`, shared by all senders of a learner.
        bucket_bytes: sent at once; a larger tensor is a bucket of its own.
        host: address of the interface to listen on, reachable by the engine.
        max_bytes_per_s: send no faster; None for as fast as the network allows.
    """

    def __init__(
        self,
        engine_id: str,
        *,
        store: dist.TCPStore,
        bucket_bytes: int = 8 << 20,
        host: str = _LOOPBACK,
        max_bytes_per_s: float | None = None,
    ) -> None:
        self._engine_id = engine_id
        self._bucket_bytes = bucket_bytes
        self._max_bytes_per_s = max_bytes_per_s
        self._listener = PairListener(store=store, host=host)
        self.address = DirectAddress(pair=self._listener.address)
        self._pair = Pair(self._listener.address, rank=0)
        self._group: PairGroup | None = None
        self._closed = False
        self._lock = threading.Lock()

    def send(self, snapshot: WeightSnapshot, *, deadline: float) -> TransferReport:
        """Send ``snapshot`` and return when the engine runs it, as :class:`WeightSender` says."""
        try:
            return self._send(snapshot, deadline)
        except TransferRejected:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            self.close()
            raise EngineLost(
                f"engine {self._engine_id!r} is lost: {type(error).__name__}: {error}"
            ) from error

    def _send(self, snapshot: WeightSnapshot, deadline: float) -> TransferReport:
        channel = self._listener.connect(self._pair, deadline=deadline)
        started = time.monotonic()
        group_name = f"{self.address.pair.pair_id}-direct"
        channel.send(
            {
                "manifest": encode_manifest(snapshot.manifest()),
                "buckets": list(plan_buckets(snapshot.layout, self._bucket_bytes)),
                "group_name": group_name,
                "new_group": self._group is None,
                "remaining_s": deadline - started,
            },
            deadline=deadline,
        )
        raise_refusal(channel.receive(deadline=deadline))
        group = self._group or self._join(channel, group_name, deadline)
        buckets = _flat_buckets(snapshot, self._bucket_bytes)
        group.broadcast(paced(buckets, self._max_bytes_per_s, deadline=deadline), deadline=deadline)
        moved = time.monotonic()
        answer = channel.receive(deadline=deadline)
        if answer["error"] is not None:
            # It did not keep its old version: there is none any more.
            raise RuntimeError(str(answer["error"]))
        return TransferReport(
            size_bytes=snapshot.layout.size_bytes,
            transfer_s=moved - started,
            load_s=time.monotonic() - moved,
        )

    def _join(self, channel: ControlChannel, name: str, deadline: float) -> PairGroup:
        address = self.address.pair
        group = PairGroup(
            rank=0,
            store_address=(address.host, address.store_port),
            # Where torch puts the keys of a group that SGLang makes under this name.
            prefix=f"{name}/{name}//cpu/",
            local_host=channel.local_host,
            deadline=deadline,
        )
        with self._lock:
            if not self._closed:
                self._group = group
                return group
        group.interrupt()
        raise ConnectionAbortedError("the pair was closed on this side")

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``send`` raises ``EngineLost``."""
        with self._lock:
            self._closed = True
            group, self._group = self._group, None
        self._listener.close()
        self._pair.close()
        if group is not None:
            group.interrupt()


def plan_buckets(layout: WeightLayout, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ``(first, end)`` of the tensors in each bucket: whole tensors, in order.

    Args:
        layout: of the tensors.
        bucket_bytes: most bytes in a bucket, unless one tensor alone is larger.
    """
    first, start = 0, 0
    ends = (*layout.offsets[1:], layout.size_bytes)
    for index, end in enumerate(ends):
        if end - start > bucket_bytes and index > first:
            yield first, index
            first, start = index, layout.offsets[index]
    yield first, len(ends)


def _flat_buckets(snapshot: WeightSnapshot, bucket_bytes: int) -> Iterator[Tensor]:
    tensors = list(snapshot.tensors.values())
    for first, end in plan_buckets(snapshot.layout, bucket_bytes):
        yield torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors[first:end]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """An accepted announcement."""

    policy_version: int
    buckets: Sequence[Sequence[int]]
    group_name: str
    new_group: bool
    deadline: float


class DirectReceiver:
    """The end of a direct pair beside the server; see :class:`WeightReceiverTransport`.

    ``receive`` returns a version without tensors; :meth:`pull` has the server fetch them.

    Args:
        address: of the sender.
        expected: layout of the engine's parameters.
    """

    def __init__(self, address: DirectAddress, *, expected: WeightLayout) -> None:
        self._pair = Pair(address.pair, rank=1)
        self._expected = expected
        self._policy_version = -1
        self._plan: _Plan | None = None

    def receive(self, timeout_s: float) -> StagedWeights | None:
        """Wait for an announcement and check it, as :class:`WeightReceiverTransport` says."""
        try:
            channel = connect_to_sender(self._pair)
            try:
                message = channel.receive(deadline=time.monotonic() + timeout_s)
            except TimeoutError:
                return None
            return self._accept(channel, message)
        except (OSError, ValueError, KeyError) as error:
            self.close()
            raise LearnerLost(f"the learner is lost: {type(error).__name__}: {error}") from error

    def _accept(self, channel: ControlChannel, message: Mapping[str, Any]) -> StagedWeights | None:
        deadline = time.monotonic() + float(message["remaining_s"])
        manifest = decode_manifest(message["manifest"])
        try:
            verify(manifest, self._expected, current_version=self._policy_version)
        except TransferRejected as rejection:
            answer = {"error": str(rejection), "retryable": rejection.retryable}
            channel.send(answer, deadline=deadline)
            return None
        self._plan = _Plan(
            policy_version=manifest.policy_version,
            buckets=message["buckets"],
            group_name=str(message["group_name"]),
            new_group=bool(message["new_group"]),
            deadline=deadline,
        )
        return StagedWeights(policy_version=manifest.policy_version, weights={}, deadline=deadline)

    async def pull(self, control: SglangControl, loader: SglangLoader) -> LoadReport:
        """Pause the server, have it receive the accepted version, and resume it.

        Raises:
            EngineBroken: if the server is left without whole weights, or paused.
            ControlError: if it refused before anything changed.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("pull() comes after a version was accepted")
        started = time.monotonic()
        async with loader.stopped(plan.deadline):
            await self._go_ahead(plan)
            if plan.new_group:
                await self._join(control, plan)
            try:
                async with loader.session(plan.deadline):
                    await self._fetch(control, plan, flush_cache=loader.recompute)
            except BaseException:
                # The learner waits in the group, and hears of it nowhere else.
                with contextlib.suppress(ControlError):
                    await control.leave_group(plan.group_name, timeout_s=_LEAVE_TIMEOUT_S)
                raise
        return LoadReport(
            policy_version=plan.policy_version,
            prepare_s=0.0,
            stall_s=time.monotonic() - started,
        )

    async def _go_ahead(self, plan: _Plan) -> None:
        """Tell the learner, which then joins the group and sends."""
        channel = connect_to_sender(self._pair)
        await asyncio.to_thread(
            channel.send, {"error": None, "retryable": False}, deadline=plan.deadline
        )

    async def _join(self, control: SglangControl, plan: _Plan) -> None:
        address = self._pair.address
        await control.join_group(
            plan.group_name,
            host=address.host,
            port=address.store_port,
            backend="gloo",
            timeout_s=plan.deadline - time.monotonic(),
        )

    async def _fetch(self, control: SglangControl, plan: _Plan, *, flush_cache: bool) -> None:
        layout = self._expected
        for first, end in plan.buckets:
            last = end == len(layout.names)
            await control.update_from_group(
                plan.group_name,
                names=layout.names[first:end],
                dtypes=layout.dtypes[first:end],
                shapes=layout.shapes[first:end],
                policy_version=plan.policy_version if last else None,
                flush_cache=flush_cache and last,
                timeout_s=plan.deadline - time.monotonic(),
            )

    def acknowledge(self, staged: StagedWeights, error: str | None) -> None:
        """Say that the engine runs ``staged``, or why not, as the protocol says."""
        if error is None:
            self._policy_version = staged.policy_version
        limit = max(staged.deadline, time.monotonic() + 0.1)
        try:
            channel = connect_to_sender(self._pair)
            channel.send({"error": error, "retryable": False}, deadline=limit)
        except OSError as reason:
            self.close()
            raise LearnerLost(f"the learner is lost: {type(reason).__name__}: {reason}") from reason

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``receive`` raises ``LearnerLost`` at once."""
        self._pair.close()
