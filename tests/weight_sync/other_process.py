"""One end of a pair in a process of its own, which reports each step through a pipe.

The processes are forked from one clean server that has imported torch, since every import takes
seconds.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrl_async.weight_sync import collective
from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.disk import DiskSender
from skyrl_async.weight_sync.pair import PairAddress, host_store
from skyrl_async.weight_sync.pair_group import PairGroup
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.weight_sync.peers import make_parameters, soon

BUCKET_BYTES = 1 << 15


@contextmanager
def process(target: Any, *arguments: object) -> Iterator[tuple[Any, Connection]]:
    """Run ``target(pipe, *arguments)``; yields the process and the other end of the pipe."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(5)
        ours.close()


def told(pipe: Connection, timeout_s: float = 20.0) -> Any:
    """Return the next report."""
    assert pipe.poll(timeout_s), "the other process reported nothing"
    return pipe.recv()


def checksum(weights: Mapping[str, Tensor]) -> int:
    total = 0
    for tensor in weights.values():
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return total


def run_engine(
    pipe: Connection, address: PairAddress, signal_number: int | None, signal_version: int
) -> None:
    """Receive until the learner leaves; signal itself in the middle of one version's bytes."""
    layout = SnapshotPool(make_parameters(), num_buffers=1).layout
    ended = threading.Event()
    next_version = 0
    buckets_seen = 0

    class SignallingZlib:
        @staticmethod
        def crc32(data: bytes, start: int = 0) -> int:
            nonlocal buckets_seen
            buckets_seen += next_version == signal_version
            if signal_number is not None and buckets_seen == 3:
                pipe.send(("signal", next_version))
                os.kill(os.getpid(), signal_number)
            return zlib.crc32(data, start)

    collective.zlib = SignallingZlib  # type: ignore[assignment]

    def load(weights: Mapping[str, Tensor], policy_version: int) -> None:
        nonlocal next_version
        next_version = policy_version + 1
        pipe.send(("loaded", policy_version, checksum(weights)))

    def on_end(error: BaseException) -> None:
        pipe.send(("end", type(error).__name__))
        ended.set()

    transport = CollectiveReceiver(address, expected=layout)
    receiver = WeightReceiver(transport, load, on_end=on_end)
    ended.wait(30)
    receiver.close()


def run_learner(pipe: Connection, signal_number: int) -> None:
    """Publish version 0; signal itself in the middle of the bytes of version 1."""
    store = host_store()
    pool = SnapshotPool(make_parameters())
    sender = CollectiveSender("engine-0", store=store, bucket_bytes=BUCKET_BYTES)
    pipe.send(sender.address)
    sender.send(pool.take(0), deadline=soon(20))
    broadcast = PairGroup.broadcast

    def stop_half_way(group: PairGroup, buckets: Iterable[Tensor], *, deadline: float) -> None:
        broadcast(group, itertools.islice(buckets, 3), deadline=deadline)
        pipe.send(("signal", 1))
        os.kill(os.getpid(), signal_number)

    PairGroup.broadcast = stop_half_way  # type: ignore[assignment,method-assign]
    sender.send(pool.take(1), deadline=soon(1.0))


def write_and_die_before_rename(pipe: Connection, folder: Path) -> None:
    """Send version 1 through ``folder``; die between writing and renaming version 2."""
    pool = SnapshotPool(make_parameters(num_floats=1_000))
    sender = DiskSender(folder)
    pipe.send(("sent", sender.send(pool.take(1), deadline=soon(20)).size_bytes))

    def die(self: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = die  # type: ignore[assignment,method-assign]
    sender.send(pool.take(2), deadline=soon(20))
