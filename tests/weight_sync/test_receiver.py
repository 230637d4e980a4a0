import asyncio
import os
import threading
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.publisher import WeightPublisher
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.weight_sync.peers import make_parameters, soon


class DecodeLoop:
    """An engine on an event loop that swaps pointers between two decode steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.policy_version = -1
        self.outputs: dict[int, set[float]] = {}
        self._swap: tuple[Mapping[str, Tensor], int, asyncio.Future[None]] | None = None

    async def load_weights(self, weights: Mapping[str, Tensor], *, policy_version: int) -> None:
        assert self._swap is None and policy_version > self.policy_version
        assert {n: t.shape for n, t in weights.items()} == {
            n: p.shape for n, p in self.model.named_parameters()
        }
        done = asyncio.get_running_loop().create_future()
        self._swap = weights, policy_version, done
        await done

    async def decode_until(self, policy_version: int) -> None:
        while self.policy_version < policy_version:
            if self._swap is not None:
                weights, self.policy_version, done = self._swap
                for name, parameter in self.model.named_parameters():
                    parameter.data = weights[name]
                self._swap = None
                done.set_result(None)
            with torch.no_grad():
                output = float(self.model(torch.ones(64)).sum())
            self.outputs.setdefault(self.policy_version, set()).add(output)
            await asyncio.sleep(0)


def test_engine_on_an_event_loop_swaps_while_it_decodes(store: dist.TCPStore) -> None:
    learner_model, engine_model = torch.nn.Linear(64, 300), torch.nn.Linear(64, 300)
    pool = SnapshotPool(learner_model.named_parameters())
    sender = CollectiveSender("engine-0", store=store, bucket_bytes=4096)
    publisher = WeightPublisher({"engine-0": sender}, timeout_s=10)
    last_version = 20

    def train() -> None:
        for version in range(last_version + 1):
            with torch.no_grad():
                learner_model.weight.fill_(version)
                learner_model.bias.zero_()
            publisher.publish(pool.take(version))

    async def serve() -> DecodeLoop:
        engine, loop = DecodeLoop(engine_model), asyncio.get_running_loop()

        def load(weights: Mapping[str, Tensor], policy_version: int) -> None:
            loading = engine.load_weights(weights, policy_version=policy_version)
            asyncio.run_coroutine_threadsafe(loading, loop).result(timeout=10)

        expected = WeightLayout.of(engine_model.named_parameters())
        receiver = WeightReceiver(CollectiveReceiver(sender.address, expected=expected), load)
        learner = threading.Thread(target=train)
        learner.start()
        await asyncio.wait_for(engine.decode_until(last_version), 20)
        learner.join()
        receiver.check()
        await asyncio.to_thread(receiver.close)
        return engine

    engine = asyncio.run(serve())
    publisher.close()
    del engine.outputs[-1]
    assert engine.outputs == {v: {64.0 * 300 * v} for v in engine.outputs}
    assert last_version in engine.outputs


def test_receiver_and_its_groups_stay_on_the_given_cpus(store: dist.TCPStore) -> None:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    parameters = make_parameters()
    pool = SnapshotPool(parameters)
    sender = CollectiveSender("engine-0", store=store)
    before = set(os.listdir("/proc/self/task"))
    seen: list[set[int]] = []
    receiver = WeightReceiver(
        CollectiveReceiver(sender.address, expected=pool.layout),
        lambda weights, policy_version: seen.append(os.sched_getaffinity(0)),
        cpus={cpu},
    )
    sender.send(pool.take(1), deadline=soon())
    assert seen == [{cpu}]
    assert os.sched_getaffinity(0) == allowed
    started = set(os.listdir("/proc/self/task")) - before
    pinned = [task for task in started if os.sched_getaffinity(int(task)) == {cpu}]
    assert len(pinned) >= 3, "the receiver's thread, gloo's workers and its device loop"
    sender.close()
    receiver.close()


def test_impossible_cpus_end_the_receiver_and_are_reported(store: dist.TCPStore) -> None:
    sender = CollectiveSender("engine-0", store=store)
    ended = threading.Event()
    receiver = WeightReceiver(
        CollectiveReceiver(sender.address, expected=WeightLayout.of(make_parameters())),
        lambda weights, policy_version: None,
        on_end=lambda error: ended.set(),
        cpus={100_000},
    )
    assert ended.wait(5)
    try:
        receiver.check()
    except RuntimeError as error:
        assert isinstance(error.__cause__, (OSError, ValueError))
    else:
        raise AssertionError("check() must raise")
    receiver.close()
    sender.close()
