"""Ranks of a process group, each in a process of its own."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(check: Callable[[], None], *, num_ranks: int, port: int) -> None:
    """Call ``check`` on every rank of a gloo group."""
    arguments = (check, num_ranks, port)
    mp.start_processes(_run, arguments, nprocs=num_ranks, start_method="forkserver")


def _run(rank: int, check: Callable[[], None], num_ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    check()
    dist.destroy_process_group()
