"""Gathering shards in the background: what is published is what a step left, on every rank."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from skyrl_async.weight_sync.gathering import ShardedWeight, ShardGatherer
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.snapshot import WeightSnapshot

SHAPES = {"matrix": (7, 5), "few_rows": (1, 3), "vector": (6,), "cube": (4, 2, 3)}


def whole(name: str, version: int) -> torch.Tensor:
    """Return a parameter's values at a version."""
    shape = SHAPES[name]
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 0.1 + 1000 * version).reshape(shape)


def rows_of(name: str, rank: int, num_ranks: int) -> slice:
    """Return the rows that FSDP2 gives a rank."""
    size = -(-SHAPES[name][0] // num_ranks)
    return slice(min(rank * size, SHAPES[name][0]), min((rank + 1) * size, SHAPES[name][0]))


def join(rank: int, num_ranks: int, port: int):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    return dist.new_group(backend="gloo")


def split_in_two(name: str, tensor: torch.Tensor):
    """Publish every row of the cube by itself, and all else as it is."""
    if name != "cube":
        yield name, tensor
        return
    for row in range(len(tensor)):
        yield f"cube.{row}", tensor[row]


class Published:
    """Keeps what is published, and gives buffers back late and out of the thread."""

    def __init__(self, delay_s: Callable[[], float]) -> None:
        self.versions: list[int] = []
        self.tensors: list[dict[str, torch.Tensor]] = []
        self._delay_s = delay_s

    def __call__(self, snapshot: WeightSnapshot) -> None:
        self.versions.append(snapshot.policy_version)
        self.tensors.append({n: t.clone() for n, t in snapshot.tensors.items()})
        threading.Timer(self._delay_s(), snapshot.release).start()


def _train(rank: int, num_ranks: int, port: int, folder: str, seed: int, split: bool) -> None:
    group = join(rank, num_ranks, port)
    rng = random.Random(1000 * seed + rank)
    rows = {n: whole(n, 0)[rows_of(n, rank, num_ranks)].clone() for n in SHAPES}
    published = Published(lambda: rng.choice((0.0, 0.005, 0.02)))
    gatherer = ShardGatherer(
        [
            ShardedWeight(
                name=name,
                shape=SHAPES[name],
                first_row=rows_of(name, rank, num_ranks).start,
                rows=rows[name],
            )
            for name in SHAPES
        ],
        group=group,
        publish=published,
        export=split_in_two if split else None,
        timeout_s=20,
    )
    last = 40
    for version in range(1, last + 1):
        for name, part in rows.items():
            part.copy_(whole(name, version)[rows_of(name, rank, num_ranks)])
        # The collectives of a step keep the ranks together.
        dist.barrier()
        gatherer.take(version)
        gatherer.check()
        time.sleep(rng.choice((0.0, 0.0, 0.002, 0.01)))
    if rank == 0:
        deadline = time.monotonic() + 20
        while last not in published.versions:
            gatherer.check()
            assert time.monotonic() < deadline, published.versions
            time.sleep(0.005)
        gatherer.publish_newest(timeout_s=5)
        assert published.versions[-2:] == [last, last]
        names = list(SHAPES) if not split else None
        assert names is None or list(gatherer.layout.names) == names
        for version, tensors in zip(published.versions, published.tensors, strict=True):
            for name in SHAPES:
                parts = split_in_two(name, whole(name, version)) if split else None
                expected = dict(parts) if parts else {name: whole(name, version)}
                assert all(torch.equal(tensors[n], t) for n, t in expected.items()), name
        torch.save(published.versions, f"{folder}/versions.pt")
    else:
        with pytest.raises(RuntimeError, match="only the root"):
            gatherer.publish_newest(timeout_s=1)
    dist.barrier()
    gatherer.close(timeout_s=5)
    assert not gatherer._thread.is_alive()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("num_ranks", "seed", "split"),
    [(1, 0, False), (2, 1, False), (2, 4, True), (3, 2, True), (3, 3, False)],
)
def test_every_published_version_is_bit_equal_to_that_step(
    tmp_path: Path, free_port, num_ranks, seed, split
):
    mp.start_processes(
        _train,
        args=(num_ranks, free_port, str(tmp_path), seed, split),
        nprocs=num_ranks,
        start_method="fork",
    )
    versions = torch.load(tmp_path / "versions.pt")
    assert versions[:-1] == sorted(set(versions)), "in order, each once"
    assert versions[-1] == 40


def _mismatched(rank: int, num_ranks: int, port: int) -> None:
    group = join(rank, num_ranks, port)
    weight = ShardedWeight(name="w", shape=(4, 2), first_row=rank, rows=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="bytes of w together, too few"):
        ShardGatherer([weight], group=group, publish=lambda snapshot: None)
    dist.destroy_process_group()


def test_shards_that_are_not_the_whole_are_refused(free_port):
    mp.start_processes(_mismatched, args=(2, free_port), nprocs=2, start_method="fork")


def _dying(rank: int, num_ranks: int, port: int) -> None:
    group = join(rank, num_ranks, port)

    def publish(snapshot: WeightSnapshot) -> None:
        raise OSError("no room")

    weight = ShardedWeight(name="w", shape=(2,), first_row=0, rows=torch.zeros(2))
    gatherer = ShardGatherer([weight], group=group, publish=publish)
    gatherer.take(0)
    with pytest.raises(RuntimeError, match=r"weight gatherer died.*no room"):
        gatherer.publish_newest(timeout_s=5)
    with pytest.raises(RuntimeError, match="weight gatherer died"):
        gatherer.take(1)
    dist.destroy_process_group()


def test_a_gatherer_that_dies_says_so_by_its_name(free_port):
    mp.start_processes(_dying, args=(1, free_port), nprocs=1, start_method="fork")


def test_what_is_computed_when_it_is_written_has_a_place_in_the_layout():
    from skyrl_async.weight_sync.snapshot import SnapshotPool

    class Doubled:
        base = torch.ones(3)

        def write_to(self, out: torch.Tensor) -> None:
            out.copy_(2 * self.base)

    doubled = Doubled()
    plain = torch.zeros(2)
    pool = SnapshotPool([("a", plain), ("b", doubled)])
    assert pool.layout == WeightLayout.of([("a", plain), ("b", doubled.base)])
    doubled.base = torch.full((3,), 5.0)
    snapshot = pool.take(1)
    assert snapshot.tensors["b"].tolist() == [10.0] * 3
