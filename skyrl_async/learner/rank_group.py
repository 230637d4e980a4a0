"""The ranks of the learner group: what they have to agree on, and nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """Sums and maxima over the ranks of a learner group; with one rank every call does nothing.

    Args:
        rank: of this process, from 0.
        num_ranks: in the group.
        store_address: ``(host, port)`` of the ``TCPStore`` that rank 0 hosts; needed with several.
        backend: ``gloo`` or ``nccl``.
        timeout_s: of every collective; a rank that dies surfaces on the others after at most this.

    Raises:
        ValueError: if the rank is not in the group, or several ranks have no store.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        store_address: tuple[str, int] | None = None,
        backend: str = "gloo",
        timeout_s: float = 120,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        self.rank = rank
        self.num_ranks = num_ranks
        self._group: Any = None
        if num_ranks > 1:
            if store_address is None:
                raise ValueError(f"{num_ranks} ranks need the address of their store")
            timeout = timedelta(seconds=timeout_s)
            host, port = store_address
            store = dist.TCPStore(host, port, num_ranks, is_master=rank == 0, timeout=timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout
            )
            self._group = dist.group.WORLD

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks."""
        if self._group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its maximum over the ranks."""
        if self._group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, in one collective.

        A rank without a token in the minibatch has no gradients; it contributes zeros.
        """
        if self._group is None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        self.sum_(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None
