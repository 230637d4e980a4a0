"""One replay buffer under one load; replay_buffer.py runs it for each side, in one interpreter.

    PYTHON benchmarks/peers/buffers.py SIDE [--trajectories N] ...

The load between processes is the same on every side: Ray actors that produce trajectories, one Ray
actor that takes batches, and the buffer where its library puts it. Producers have the raw arrays
and make the records of their side. Every trajectory is inserted once, and as many are taken; the
consumer adds up every array. The clock starts when all processes are ready and ends when the last
batch was added up. The last line of stdout is one JSON object.

* ``ours``: the coordinator of the product with its admission and its buffer, and the handles that
  the product talks to its actors with; versions, cut-offs and leases are kept. Four batches are
  admitted, as many as TorchRL's storage holds.
* ``torchrl``: ``RayReplayBuffer`` with a ``LazyTensorStorage`` of four batches.
* ``transferqueue``: its controller and two storage units, as it starts them by default.

``SIDE-alone`` is a loop of insert and sample in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from buffers_load import FIELDS, GROUP_SIZE, Load, raw_arrays, start_ray
from buffers_ours import ours, ours_alone


def make_tensordict(count: int, version: int, raw: dict[str, np.ndarray]) -> Any:
    """Return the same trajectories as a TensorDict."""
    import torch
    from tensordict import TensorDict

    values = {name: torch.from_numpy(raw[name][:count]) for name in FIELDS if name != FIELDS[3]}
    versions = raw["policy_versions"][:count] + np.int32(version) * raw["sampled"][:count]
    values["policy_versions"] = torch.from_numpy(versions)
    values["reward"] = torch.arange(count) % 2
    return TensorDict(values, batch_size=[count])


class Writer:
    """Inserts chunks into a buffer of another library."""

    def __init__(self, load: Load, connect: Callable[[], Callable[[Any], Any]]) -> None:
        self._load = load
        self._raw = raw_arrays(load, load.chunk)
        self._put = connect()

    def ready(self) -> None:
        """Return when the actor is there, with its imports."""
        make_tensordict(self._load.chunk, 0, self._raw)

    def run(self) -> None:
        """Insert this producer's share."""
        for number in range(self._load.trajectories // self._load.chunk // self._load.producers):
            self._put(make_tensordict(self._load.chunk, number, self._raw))


class Reader:
    """Takes batches, and adds them up."""

    def __init__(self, load: Load, connect: Callable[[], Callable[[int], Any]]) -> None:
        self._load = load
        self._take = connect()
        self.total = 0.0

    def ready(self) -> None:
        """Return when the actor is there."""

    def run(self) -> int:
        """Take all batches; return the number of trajectories."""
        taken = 0
        for _ in range(self._load.steps):
            data = self._take(self._load.batch)
            self.total += sum(float(data[name].sum()) for name in FIELDS)
            taken += len(data)
        return taken


def transfer(load: Load, writing: Any, reading: Any, first: Callable[[Any], None]) -> float:
    """Return the seconds until writers and reader are done."""
    import ray

    writer = ray.remote(Writer).options(num_cpus=0)
    writers = [writer.remote(load, writing) for _ in range(load.producers)]
    reader = ray.remote(Reader).options(num_cpus=0).remote(load, reading)
    ray.get([handle.ready.remote() for handle in (*writers, reader)])
    first(make_tensordict(load.batch, 0, raw_arrays(load, load.batch)))
    started = time.perf_counter()
    calls = [handle.run.remote() for handle in (*writers, reader)]
    taken = ray.get(calls, timeout=300)[-1]
    if taken != load.trajectories:
        raise RuntimeError(f"{taken} trajectories were taken, {load.trajectories} inserted")
    return time.perf_counter() - started


def torchrl(load: Load) -> float:
    """Return the seconds of TorchRL's buffer in a Ray actor."""
    from torchrl.data import LazyTensorStorage, RayReplayBuffer

    start_ray()
    buffer = RayReplayBuffer(
        storage=partial(LazyTensorStorage, 4 * load.batch),
        batch_size=load.batch,
        remote_config={"num_cpus": 0},
        ray_init_config={},
    )
    client = buffer.client()

    def connect_writer() -> Callable[[Any], Any]:
        return client.extend

    def connect_reader() -> Callable[[int], Any]:
        return client.sample

    # A batch must be there before it can be sampled; this one is not counted.
    return transfer(load, connect_writer, connect_reader, lambda data: buffer.extend(data))


def transferqueue(load: Load) -> float:
    """Return the seconds of TransferQueue."""
    import transfer_queue as tq
    from omegaconf import OmegaConf

    start_ray()
    # A consumer that waits inside the controller keeps it from taking in what writers announce.
    tq.init(OmegaConf.create({"controller": {"polling_mode": True}}))

    def connect_writer() -> Callable[[Any], Any]:
        import transfer_queue

        transfer_queue.init()
        return partial(transfer_queue.get_client().put, partition_id="train")

    def connect_reader() -> Callable[[int], Any]:
        import transfer_queue

        transfer_queue.init()
        client = transfer_queue.get_client()

        get_meta = partial(
            client.get_meta,
            data_fields=list(FIELDS),
            partition_id="train",
            task_name="learner",
        )

        def take(count: int) -> Any:
            while not (meta := get_meta(batch_size=count)).size:
                time.sleep(0.001)
            data = client.get_data(meta)
            client.clear_samples(meta)
            return data

        return take

    return transfer(load, connect_writer, connect_reader, lambda data: None)


def torchrl_alone(load: Load, *, storage: str) -> float:
    from torchrl.data import LazyTensorStorage, ListStorage, ReplayBuffer

    classes = {"lazy": LazyTensorStorage, "list": ListStorage}
    options = {} if storage == "lazy" else {"collate_fn": lambda items: items}
    buffer = ReplayBuffer(
        storage=classes[storage](4 * load.batch), batch_size=load.batch, **options
    )
    chunk = make_tensordict(load.chunk, 0, raw_arrays(load, load.chunk))
    chunks = [chunk.clone() for _ in range(load.batch // load.chunk)]
    for one in chunks:
        buffer.extend(one)
    started = time.perf_counter()
    for _ in range(load.steps):
        for one in chunks:
            buffer.extend(one)
        buffer.sample()
    return time.perf_counter() - started


SIDES: dict[str, Callable[[Load], float]] = {
    "ours": ours,
    "torchrl": torchrl,
    "transferqueue": transferqueue,
    "ours-alone": ours_alone,
    "torchrl-tensor-alone": partial(torchrl_alone, storage="lazy"),
    "torchrl-list-alone": partial(torchrl_alone, storage="list"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("side", choices=tuple(SIDES))
    parser.add_argument("--trajectories", type=int, default=5120)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--producers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=GROUP_SIZE)
    args = vars(parser.parse_args())
    side = args.pop("side")
    load = Load(**args)
    seconds = SIDES[side](load)
    print(json.dumps({"side": side, "seconds": seconds, **dataclasses.asdict(load)}), flush=True)


if __name__ == "__main__":
    main()
