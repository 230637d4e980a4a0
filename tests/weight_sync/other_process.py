"""One end of a pair in a process of its own; it reports each step as a line on stdout.

``engine ADDRESS [SIGNAL VERSION]`` receives until the learner leaves; with a signal, it sends that
to itself in the middle of the bytes of VERSION. ``learner SIGNAL`` prints its address, publishes
version 0, and sends the signal to itself in the middle of version 1.
"""

import ast
import os
import signal
import sys
import threading
import zlib

from skyrl_async.weight_sync import collective
from skyrl_async.weight_sync.collective import (
    CollectiveReceiver,
    CollectiveSender,
    PairAddress,
    host_store,
)
from skyrl_async.weight_sync.pair_group import PairGroup
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.weight_sync.peers import make_parameters, soon

BUCKET_BYTES = 1 << 15


def say(*words: object) -> None:
    print(*words, flush=True)


def receive(address: PairAddress, signal_number: int | None, version: int) -> None:
    layout = SnapshotPool(make_parameters(), num_buffers=1).layout
    ended = threading.Event()
    loaded: list[int] = []
    buckets_seen = 0

    def checksum(data: bytes, start: int = 0) -> int:
        nonlocal buckets_seen
        buckets_seen += len(loaded) == version
        if signal_number is not None and buckets_seen == 3:
            say("signal", version)
            os.kill(os.getpid(), signal_number)
        return zlib.crc32(data, start)

    class CountingZlib:
        crc32 = staticmethod(checksum)

    collective.zlib = CountingZlib  # type: ignore[assignment]

    def load(weights: dict, policy_version: int) -> None:
        total = 0
        for tensor in weights.values():
            total = zlib.crc32(tensor.reshape(-1).view(collective_uint8).numpy(), total)
        loaded.append(policy_version)
        say("loaded", policy_version, total)

    def on_end(error: BaseException) -> None:
        say("end", type(error).__name__)
        ended.set()

    transport = CollectiveReceiver(address, expected=layout)
    receiver = WeightReceiver(transport, load, on_end=on_end)  # type: ignore[arg-type]
    ended.wait(30)
    receiver.close()


def publish(signal_number: int) -> None:
    store = host_store()
    pool = SnapshotPool(make_parameters())
    sender = CollectiveSender("engine-0", store=store, bucket_bytes=BUCKET_BYTES)
    say(vars_of(sender.address))
    sender.send(pool.take(0), deadline=soon(20))
    broadcast = PairGroup.broadcast

    def stop_half_way(group: PairGroup, buckets: tuple, *, deadline: float) -> None:
        broadcast(group, buckets[:3], deadline=deadline)
        say("signal", 1)
        os.kill(os.getpid(), signal_number)

    PairGroup.broadcast = stop_half_way  # type: ignore[assignment,method-assign]
    sender.send(pool.take(1), deadline=soon(1.0))


def vars_of(address: PairAddress) -> dict[str, object]:
    return {name: getattr(address, name) for name in PairAddress.__slots__}


if __name__ == "__main__":
    import torch

    collective_uint8 = torch.uint8
    role, *rest = sys.argv[1:]
    if role == "engine":
        chosen = signal.Signals[rest[1]] if len(rest) > 1 else None
        receive(PairAddress(**ast.literal_eval(rest[0])), chosen, int(rest[2]) if chosen else -1)
    else:
        publish(signal.Signals[rest[0]])
