"""What other processes do in the tests of training states: ranks, and writers that are killed."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from skyrl_async.checkpoint import CONFIG, LEARNER, RUN_STATE, begin, commit, prune
from skyrl_async.learner.training_state import StateWriter, TrainingState, load_training_state

_COUNTED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.fsync")


def make_state(seed: int, *, shard: bool = False, rate: float = 1e-2) -> TrainingState:
    """Return a small module with its AdamW; with ``shard`` over all ranks of the default group."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3, bias=False)
    )
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module[0])
        fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.1)
    return TrainingState(module=module, optimizer=optimizer)


def train(state: TrainingState, *, steps: int, seed: int) -> None:
    """Take steps with gradients that depend on the seed alone, however the module is sharded."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in state.module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = gradient
        state.optimizer.step()
        state.optimizer.zero_grad()


def whole_weights(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return all weights, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in state.module.named_parameters()
    }


def go_on_as_a_rank(rank: int, num_ranks: int, port: int, place: Path, shard: bool) -> None:
    """Load the state in ``place/before``, take one step, write it to ``place/after``."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        state = make_state(99, shard=shard)
        writer = StateWriter(rank=rank, num_ranks=num_ranks, timeout_s=60)
        counters = load_training_state(state, place / "before", rank=rank, num_ranks=num_ranks)
        assert counters == {"policy_version": 3}
        loaded = whole_weights(state)
        train(state, steps=1, seed=7)
        torch.manual_seed(100 + rank)
        after = TrainingState(
            module=state.module, optimizer=state.optimizer, counters={"policy_version": 4}
        )
        writer.start(after, place / "after")
        train(state, steps=1, seed=8)
        writer.finish()
        if rank == 0:
            torch.save(loaded, place / "loaded.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def write_checkpoint(root: Path, step: int) -> Path:
    """Write a whole checkpoint whose weights depend on the step, and keep only the newest."""
    state = make_state(step)
    train(state, steps=1, seed=step)
    partial = begin(root, step)
    writer = StateWriter()
    writer.start(state, partial / LEARNER)
    writer.finish()
    (partial / CONFIG).write_text("seed: 0\n")
    (partial / RUN_STATE).write_text("{}")
    folder = commit(partial, step=step, policy_version=step, num_ranks=1)
    prune(root, keep=1)
    return folder


def write_and_be_killed(root: Path, step: int, place: int) -> None:
    """Write a checkpoint; be killed right before the change number ``place`` of the file system."""
    torch.set_num_threads(1)
    left = [place]

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event in _COUNTED and _changes_something(event, arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        real_fsync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(count)
    write_checkpoint(root, step)


def _changes_something(event: str, arguments: tuple[object, ...]) -> bool:
    if event != "open":
        return True
    mode = arguments[1]
    return isinstance(mode, str) and any(letter in mode for letter in "wax+")


def write_beyond_a_limit(place: Path, limit_bytes: int, messages: object) -> None:
    """Write a state where no file may grow beyond a limit, and report what came of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    writer = StateWriter()
    writer.start(make_state(0), place)
    try:
        writer.finish()
    except OSError as error:
        messages.put(str(error))  # type: ignore[attr-defined]
    else:
        messages.put("no error")  # type: ignore[attr-defined]
