"""The other ranks of a fine-tuning: processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import NoReturn

from skyrl_async.sft.data import DemonstrationSet
from skyrl_async.sft.plan import SftPlan

END_TIMEOUT_S = 10.0
"""Time for the other ranks to end when rank 0 has."""


class RankDied(RuntimeError):
    """Another rank ended before its time, so that rank 0 could not go on."""


@contextmanager
def other_ranks(plan: SftPlan, data: DemonstrationSet) -> Iterator[tuple[str, int] | None]:
    """Run all ranks but 0 while the context lasts; give the address of the group's store.

    Ranks that still run when the context is left by an error are killed; otherwise they get
    :data:`END_TIMEOUT_S` to end by themselves.

    Args:
        plan: what they do.
        data: likewise.

    Raises:
        RankDied: in place of an error of rank 0 that another rank's end explains, and if one of
            them fails at the end.
    """
    num_ranks = plan.config.learner.num_ranks
    if num_ranks == 1:
        yield None
        return
    address = ("127.0.0.1", _free_port())
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=run_rank, args=(plan, data, rank, address), name=f"rank {rank}")
        for rank in range(1, num_ranks)
    ]
    try:
        for process in processes:
            process.start()
        yield address
        for process in processes:
            process.join(END_TIMEOUT_S)
    except Exception as error:
        # A rank that dies is noticed by its neighbour first.
        for process in processes:
            process.join(1.0)
        died = _failed(processes)
        if died:
            raise RankDied(f"{died} ended early (its output says why): {error}") from error
        raise
    finally:
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.kill()
                process.join(END_TIMEOUT_S)
    died = _failed(processes)
    if died:
        raise RankDied(f"{died} failed at the end (its output says why)")


def run_rank(plan: SftPlan, data: DemonstrationSet, rank: int, address: tuple[str, int]) -> None:
    """Be one rank, from the start of this process to its end."""
    # Rank 0 decides when to stop, and all end together; it kills this process if need be.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from skyrl_async.sft.loop import SftLoop

    with SftLoop(plan, data, rank=rank, store_address=address) as loop:
        loop.run()
    leave(0)


def leave(exit_code: int) -> NoReturn:
    """End this process, whose files are all written, without tearing its interpreter down.

    One that has had process groups aborts there now and then, because a thread of theirs is not
    joined: the exit code would tell of a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _failed(processes: list[BaseProcess]) -> str:
    """Name those that ended with an error."""
    return ", ".join(
        f"{process.name} (exit code {process.exitcode})"
        for process in processes
        if process.exitcode not in (None, 0)
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
