"""What the tests of this folder put at the two ends of a pair."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.control_channel import ControlChannel
from skyrl_async.weight_sync.pair import PairAddress
from skyrl_async.weight_sync.pair_group import PairGroup
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool

Parameters = list[tuple[str, Tensor]]


def make_parameters(seed: int = 0, *, num_floats: int = 70_000) -> Parameters:
    """Mixed types and shapes, sizes that need padding, one tensor that spans buckets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ("embed.weight", torch.randn(num_floats, generator=generator).reshape(-1, 10)),
        ("norm.weight", torch.randn(7, generator=generator)),
        ("head.weight", torch.randn(33, 5, generator=generator).to(torch.bfloat16)),
        ("scale", torch.randn((), generator=generator)),
        ("steps", torch.randint(0, 1000, (3,), generator=generator)),
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    assert list(weights) == list(parameters)
    for name, tensor in parameters.items():
        assert weights[name].dtype == tensor.dtype and weights[name].shape == tensor.shape
        assert bits(weights[name]) == bits(tensor), name


class PointerEngine:
    """An engine that, like the embedded one, keeps the given tensors as its live parameters."""

    def __init__(self, parameters: Parameters) -> None:
        self.live: Mapping[str, Tensor] = {name: tensor.clone() for name, tensor in parameters}
        self.policy_version = -1
        self.loaded: list[int] = []
        self.before_load: Callable[[int], None] = lambda policy_version: None

    def load(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        self.before_load(policy_version)
        assert policy_version > self.policy_version
        assert list(weights) == list(self.live)
        self.live, self.policy_version = weights, policy_version
        self.loaded.append(policy_version)


class Pair:
    """A sender and a receiver thread over real gloo, both in this process."""

    def __init__(
        self, store: dist.TCPStore, parameters: Parameters, *, bucket_bytes: int = 1 << 16
    ) -> None:
        self.pool = SnapshotPool(parameters)
        self.engine = PointerEngine(parameters)
        self.ends: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.sender = CollectiveSender("engine-0", store=store, bucket_bytes=bucket_bytes)
        self.receiver = WeightReceiver(
            CollectiveReceiver(self.sender.address, expected=self.pool.layout),
            self.engine.load,
            on_end=self.ends.put,
        )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sender.close()
        self.receiver.close()


def soon(timeout_s: float = 5.0) -> float:
    return time.monotonic() + timeout_s


def in_thread(function: Callable[[], Any]) -> Callable[[], tuple[Any, float]]:
    """Start ``function``; the result waits and returns (outcome or exception, time it ended)."""
    outcome: list[tuple[Any, float]] = []

    def run() -> None:
        try:
            value: Any = function()
        except Exception as error:
            value = error
        outcome.append((value, time.monotonic()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> tuple[Any, float]:
        thread.join(10)
        assert outcome, "the call did not return within 10 s"
        return outcome[0]

    return wait


class HandDrivenEngine:
    """The engine's end of the protocol, one message at a time."""

    def __init__(self, address: PairAddress, *, pair_id: str | None = None) -> None:
        self.address = address
        self.channel = ControlChannel.connect(address.host, address.control_port, deadline=soon())
        self.channel.send({"pair_id": pair_id or address.pair_id}, deadline=soon())

    def join(self, announcement: dict[str, Any]) -> PairGroup:
        self.channel.send({"error": None, "retryable": False}, deadline=soon())
        return _group(self.address, announcement["group_number"], rank=1)


class HandDrivenLearner:
    """The learner's end of the protocol, one message at a time."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = PairAddress(
            host="127.0.0.1",
            control_port=self._listener.getsockname()[1],
            store_port=store.port,
            pair_id=f"by-hand-{id(self)}-{time.monotonic_ns()}",
        )

    def accept(self) -> None:
        self._listener.settimeout(5)
        self.channel = ControlChannel(self._listener.accept()[0])
        self._listener.close()
        assert self.channel.receive(deadline=soon()) == {"pair_id": self.address.pair_id}

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.channel.send(message, deadline=soon())
        return self.channel.receive(deadline=soon())

    def join(self, group_number: int) -> PairGroup:
        return _group(self.address, group_number, rank=0)


def _group(address: PairAddress, number: int, *, rank: int) -> PairGroup:
    return PairGroup(
        rank=rank,
        store_address=(address.host, address.store_port),
        prefix=f"{address.pair_id}/{number}",
        local_host="127.0.0.1",
        deadline=soon(),
    )
