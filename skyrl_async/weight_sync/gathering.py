"""Publishing sharded weights: shards are copied on every rank, and gathered while training goes on.

After a step every rank copies its shard to host memory, without a collective. A thread on each rank
then sends the shards to the root of its shard group, over a process group of its own, and the root
publishes the whole. No device memory is needed, and no rank but the root holds all weights.

Which version is gathered next is agreed on by the threads alone. The ranks train in lockstep, so
that at any moment their newest versions differ by one at most. Once all threads are ready, each
rank keeps its newest two versions and all that follow; when all of them do, the least of their
newest versions is one that every rank has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.snapshot import SnapshotPool, WeightSnapshot, WeightSource

_CLOSED = -1
_NUM_SHARD_BUFFERS = 4
"""The newest two, and one that is being sent; or with two more that come while ranks agree."""

ExportTensors = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]
"""From a parameter to what it is published as: names, and views of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedWeight:
    """One parameter as a rank has it: some of its rows.

    Attributes:
        name: of the parameter.
        shape: of the whole.
        first_row: of the rank's rows in the whole.
        rows: ``[number of rows, *shape[1:]]``, or what writes them.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    rows: Tensor | WeightSource


class ShardGatherer:
    """Copies shards in the training thread and publishes the whole in the background.

    ::

        gatherer = ShardGatherer(weights, group=group, publish=publisher.publish)
        while True:
            version = train()
            gatherer.take(version)      # copies this rank's rows, and returns
            gatherer.check()

    Args:
        weights: the same parameters in the same order on every rank.
        group: gloo process group of the ranks that share the weights, for this object alone; its
            first rank is the root.
        publish: given each gathered snapshot, which it releases; called at the root.
        dtype: of the published floating-point tensors; None keeps each parameter's own.
        export: how a whole parameter is published; None for as it is.
        timeout_s: that the publisher may take to give back a snapshot.
    """

    def __init__(
        self,
        weights: Sequence[ShardedWeight],
        *,
        group: Any,
        publish: Callable[[WeightSnapshot], None],
        dtype: torch.dtype | None = None,
        export: ExportTensors | None = None,
        timeout_s: float = 600,
    ) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._publish = publish
        self._is_root = dist.get_rank(group) == 0
        self._pool = SnapshotPool(
            ((weight.name, weight.rows) for weight in weights),
            dtype=dtype,
            num_buffers=_NUM_SHARD_BUFFERS,
        )
        self._shards = [_Shard.of(weight, self._pool.layout) for weight in weights]
        self._spans = _exchange_spans(self._shards, group)
        self._whole: _WholeBuffers | None = None
        if self._is_root:
            self._whole = _WholeBuffers(self._shards, export=export, dtype=dtype)
        self._changed = threading.Condition()
        self._held: dict[int, WeightSnapshot] = {}
        self._agreeing = False
        self._sent = _CLOSED
        self._last = _CLOSED
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="weight-gatherer", daemon=True)
        self._thread.start()

    @property
    def layout(self) -> WeightLayout:
        """Of the published weights.

        Raises:
            RuntimeError: if this is not the root.
        """
        if self._whole is None:
            raise RuntimeError("only the root of a shard group has the whole weights")
        return self._whole.layout

    def take(self, policy_version: int) -> None:
        """Copy this rank's rows; they are gathered as soon as the version before them is.

        Every rank takes the same versions in the same order. Waits only if there are more than two
        of them in the moment in which the ranks agree on one.

        Raises:
            RuntimeError: if the background thread has died.
            TimeoutError: if the ranks do not agree in time.
        """
        with self._changed:
            if not self._agreeing:
                for old in sorted(set(self._held) - {self._sent})[:-1]:
                    self._held.pop(old).release()
            if not self._changed.wait_for(
                lambda: len(self._held) < _NUM_SHARD_BUFFERS or self._error is not None,
                self._timeout_s,
            ):
                raise TimeoutError(f"the ranks do not agree for more than {self._timeout_s:g} s")
            self.check()
            self._held[policy_version] = self._pool.take(policy_version)
            self._changed.notify_all()

    def publish_newest(self, *, timeout_s: float) -> None:
        """Publish the newest gathered version again, for the sake of a new engine. Root only.

        Raises:
            TimeoutError: if nothing is gathered by then.
            RuntimeError: if this is not the root, or the background thread has died.
        """
        if self._whole is None:
            raise RuntimeError("only the root of a shard group can publish")
        with self._changed:
            gathered = self._changed.wait_for(
                lambda: self._last >= 0 or self._error is not None, timeout_s
            )
        self.check()
        if not gathered:
            raise TimeoutError(f"no weights were gathered within {timeout_s:g} s")
        self._publish(self._whole.newest())

    def check(self) -> None:
        """Do nothing while the background thread works.

        Raises:
            RuntimeError: from the exception that ended it.
        """
        if self._error is not None:
            raise RuntimeError(f"the weight gatherer died: {self._error!r}") from self._error

    def close(self, *, timeout_s: float = 1.0) -> None:
        """Stop; all ranks call it. Waits for the thread, which may wait for other ranks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (version := self._agree()) != _CLOSED:
                snapshot = self._held[version]
                snapshot.wait_for_copy()
                self._gather(snapshot)
                with self._changed:
                    self._last = version
                    for old in [v for v in self._held if v <= version]:
                        self._held.pop(old).release()
                    self._changed.notify_all()
        except BaseException as error:
            if not self._closed:
                self._error = error
            with self._changed:
                self._changed.notify_all()

    def _agree(self) -> int:
        """Wait for a new version and return the newest one that every rank has."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or max(self._held, default=-1) > self._last)
        dist.barrier(group=self._group)
        with self._changed:
            self._agreeing = True
        dist.barrier(group=self._group)
        with self._changed:
            least = torch.tensor(_CLOSED if self._closed else max(self._held))
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        with self._changed:
            self._agreeing, self._sent = False, int(least)
            for old in [v for v in self._held if v < self._sent]:
                self._held.pop(old).release()
            self._changed.notify_all()
        return self._sent

    def _gather(self, snapshot: WeightSnapshot) -> None:
        root = dist.get_global_rank(self._group, 0)
        if self._whole is None:
            for shard in self._shards:
                if shard.size_bytes:
                    dist.send(shard.bytes_in(snapshot.flat), root, group=self._group)
            return
        buffer = self._whole.next_buffer(timeout_s=self._timeout_s)
        for number, shard in enumerate(self._shards):
            target = self._whole.target(buffer, number)
            start = shard.start_bytes
            target[start : start + shard.size_bytes].copy_(shard.bytes_in(snapshot.flat))
            pending = [
                dist.irecv(target[first : first + size], source, group=self._group)
                for source, (first, size) in self._spans[number]
                if size
            ]
            for receiving in pending:
                assert receiving is not None, "this rank is in the group"
                receiving.wait()
            self._whole.finish(buffer, number, target)
        self._publish(self._whole.snapshot(buffer, snapshot.policy_version))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """Where a rank's rows lie in its flat copy and in the whole parameter.

    Attributes:
        offset_bytes: in the rank's flat copy.
        size_bytes: of the rows.
        start_bytes: of the rows in the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    size_bytes: int
    start_bytes: int

    @classmethod
    def of(cls, weight: ShardedWeight, layout: WeightLayout) -> _Shard:
        number = layout.names.index(weight.name)
        dtype: torch.dtype = getattr(torch, layout.dtypes[number])
        row_bytes = math.prod(weight.shape[1:]) * dtype.itemsize
        return cls(
            name=weight.name,
            shape=weight.shape,
            dtype=dtype,
            offset_bytes=layout.offsets[number],
            size_bytes=math.prod(layout.shapes[number]) * dtype.itemsize,
            start_bytes=weight.first_row * row_bytes,
        )

    def bytes_in(self, flat: Tensor) -> Tensor:
        return flat[self.offset_bytes : self.offset_bytes + self.size_bytes]


def _exchange_spans(
    shards: Sequence[_Shard], group: Any
) -> list[list[tuple[int, tuple[int, int]]]]:
    """Return for each parameter the global rank and place of all shards but the root's.

    Raises:
        ValueError: if the ranks do not have all of every parameter together, each part once.
    """
    mine = [(shard.name, (shard.start_bytes, shard.size_bytes)) for shard in shards]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    spans = []
    for number, shard in enumerate(shards):
        parts = [(dist.get_global_rank(group, r), of[number]) for r, of in enumerate(everyone)]
        end = 0
        for _, (name, (start, size)) in sorted(parts, key=lambda part: part[1][1]):
            if name != shard.name or (size and start != end):
                raise ValueError(f"the ranks have {shard.name} in parts that do not fit together")
            end += size
        if end != math.prod(shard.shape) * shard.dtype.itemsize:
            raise ValueError(f"the ranks have {end} bytes of {shard.name} together, too few")
        spans.append([(rank, place) for rank, (_, place) in parts[1:]])
    return spans


class _WholeBuffers:
    """Two host buffers with all weights: one that is being gathered, one that is published.

    A buffer is free when nobody who was given a snapshot of it holds that any more.
    """

    def __init__(
        self,
        shards: Sequence[_Shard],
        *,
        export: ExportTensors | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._shards = shards
        self._export = export
        whole = ((s.name, torch.empty(s.shape, dtype=s.dtype, device="meta")) for s in shards)
        published = whole if export is None else (p for n, t in whole for p in export(n, t))
        self.layout = WeightLayout.of(published, dtype=dtype)
        self._offsets = dict(zip(self.layout.names, self.layout.offsets, strict=True))
        self._buffers = [FlatBuffer(self.layout) for _ in range(2)]
        self._uses = [0, 0]
        self._newest: tuple[int, int] = (0, -1)
        self._changed = threading.Condition()

    def next_buffer(self, *, timeout_s: float) -> int:
        """Wait until the buffer that is not the newest one is free, and return its number.

        Raises:
            TimeoutError: if it is still in use by then.
        """
        number = 1 - self._newest[0]
        with self._changed:
            if not self._changed.wait_for(lambda: self._uses[number] == 0, timeout_s):
                raise TimeoutError(f"a version is being published for more than {timeout_s:g} s")
        return number

    def target(self, buffer: int, number: int) -> Tensor:
        """Return the bytes ``[size of the parameter]`` to gather one parameter into."""
        shard = self._shards[number]
        size = math.prod(shard.shape) * shard.dtype.itemsize
        if self._export is not None:
            return torch.empty(size, dtype=torch.uint8)
        start = self._offsets[shard.name]
        return self._buffers[buffer].flat[start : start + size]

    def finish(self, buffer: int, number: int, target: Tensor) -> None:
        """Put a gathered parameter where it is published."""
        if self._export is None:
            return
        shard = self._shards[number]
        for name, part in self._export(shard.name, target.view(shard.dtype).view(shard.shape)):
            self._buffers[buffer].tensors[name].copy_(part)

    def snapshot(self, buffer: int, policy_version: int) -> WeightSnapshot:
        """Return a snapshot of a buffer that was gathered, which is the newest now."""
        self._newest = (buffer, policy_version)
        return self.newest()

    def newest(self) -> WeightSnapshot:
        """Return another snapshot of the newest buffer."""
        number, policy_version = self._newest
        with self._changed:
            self._uses[number] += 1

        def release(_: FlatBuffer) -> None:
            with self._changed:
                self._uses[number] -= 1
                self._changed.notify_all()

        return WeightSnapshot(
            policy_version,
            layout=self.layout,
            buffer=self._buffers[number],
            ready=None,
            release=release,
        )
