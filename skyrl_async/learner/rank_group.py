"""The ranks of the learner group: who shares what with whom, and what they have to agree on."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """Places of the ranks, and sums and maxima over them; with one rank every call does nothing.

    Neighbouring ranks form sequence groups: their ranks hold parts of the same tokens. Batches are
    divided over the sequence groups. Weights are sharded over ``shard_ranks`` neighbours, and every
    such shard group holds all of them::

        rank                 0 1 2 3     num_ranks=4, shard_ranks=2, sequence_ranks=2
        data_rank            0 0 1 1
        sequence_rank        0 1 0 1
        place in its shards  0 1 0 1     ranks 0 and 2 are replicas

    Args:
        rank: of this process, from 0.
        num_ranks: in the group.
        store_address: ``(host, port)`` of the ``TCPStore`` that rank 0 hosts; needed with several.
        device: that the learner computes on; ``cuda`` adds NCCL to gloo.
        timeout_s: of every collective; a rank that dies surfaces on the others after at most this.
        shard_ranks: ranks that share one copy of the weights.
        sequence_ranks: ranks that share the tokens of a microbatch.

    Raises:
        ValueError: if the rank is not in the group, several ranks have no store, or the ranks
            cannot be divided so.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        store_address: tuple[str, int] | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        timeout_s: float = 120,
        shard_ranks: int = 1,
        sequence_ranks: int = 1,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        for name, size in (("shard_ranks", shard_ranks), ("sequence_ranks", sequence_ranks)):
            if size < 1 or num_ranks % size:
                raise ValueError(f"{name} must divide the {num_ranks} ranks, got {size}")
        if num_ranks > 1 and store_address is None:
            raise ValueError(f"{num_ranks} ranks need the address of their store")
        self.rank = rank
        self.num_ranks = num_ranks
        self.shard_ranks = shard_ranks
        self.sequence_ranks = sequence_ranks
        self.data_rank, self.sequence_rank = divmod(rank, sequence_ranks)
        self.num_data_ranks = num_ranks // sequence_ranks
        self.device = torch.device(device)
        self.sequence_group: Any = None
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None
        self._mesh: Any = None
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
            self.device = torch.device("cuda", torch.cuda.current_device())
        if num_ranks > 1:
            self._join(store_address)

    def _join(self, store_address: tuple[str, int] | None) -> None:
        assert store_address is not None
        host, port = store_address
        size, on_gpu = self.num_ranks, self.device.type == "cuda"
        _keep_to_loopback(host)
        options: dict[str, Any] = {}
        if self.rank == 0:
            # Left alone, a TCPStore listens on all interfaces.
            options["master_listen_fd"] = socket.create_server((host, port)).detach()
        store = dist.TCPStore(
            host, port, size, is_master=self.rank == 0, timeout=self._timeout, **options
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=self.rank,
            world_size=size,
            timeout=self._timeout,
        )
        self._group = dist.group.WORLD
        if self.sequence_ranks > 1:
            self.sequence_group = self._own_group(self.sequence_ranks)

    def _own_group(self, size: int, *, backend: str | None = None) -> Any:
        """Return the group of this rank among groups of ``size`` neighbours; all ranks call it."""
        own = None
        for start in range(0, self.num_ranks, size):
            members = list(range(start, start + size))
            group = dist.new_group(members, backend=backend, timeout=self._timeout)
            if self.rank in members:
                own = group
        return own

    @property
    def counts(self) -> bool:
        """Whether this rank adds its loss to the sum: one of each sequence group does.

        Gradients are added by all, as each rank has those of its own tokens only.
        """
        return self.sequence_rank == 0

    @property
    def is_replica(self) -> bool:
        """Whether another shard group, with a lower rank, holds the same weights."""
        return self.rank >= self.shard_ranks

    def mesh(self) -> Any:
        """Return the device mesh of the weights: replicas x shards, or shards alone.

        One rank forms a group of its own at the first call, because a mesh needs one.
        """
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            if self._group is None:
                self._join_alone()
            kind = self.device.type
            replicas = self.num_ranks // self.shard_ranks
            shape: tuple[int, ...] = (self.shard_ranks,)
            names: tuple[str, ...] = ("shard",)
            if replicas > 1:
                shape, names = (replicas, self.shard_ranks), ("replicate", "shard")
            self._mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        return self._mesh

    def _join_alone(self) -> None:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            _keep_to_loopback("127.0.0.1")
            store = dist.HashStore()
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, timeout=self._timeout
            )
            self._group = dist.group.WORLD

    def new_shard_group(self) -> Any:
        """Return a further gloo group of this rank's shard group, for a thread of its own.

        All ranks call it. Two threads must not share a group: their collectives would mix.
        """
        return self._own_group(self.shard_ranks, backend="gloo")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its maximum over the ranks."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor``, in host memory, by that of rank 0."""
        if self.num_ranks > 1:
            dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, in one collective.

        A rank without a token in the minibatch has no gradients; it contributes zeros.
        """
        if self.num_ranks == 1 or not parameters:
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


def _keep_to_loopback(host: str) -> None:
    """Keep process groups of this process to loopback if their store is there."""
    if ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
        interface = "lo" if sys.platform == "linux" else "lo0"
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface)
