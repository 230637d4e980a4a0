"""Sequence parallelism: each rank has a slice of a flat row, and attention sees all of it.

Before attention, P ranks exchange "my tokens of all heads" for "all tokens of my heads", and back
after it (Jacobs et al. 2023, "DeepSpeed Ulysses"). All else in a decoder layer is token by token.

Shapes: ``t`` tokens of a rank, ``T = P t`` of the row, ``A`` query heads, ``G`` key-value heads,
``D`` width of a head.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(
    query: Tensor, key: Tensor, value: Tensor, *, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Give every rank all tokens of its share of the heads, in one exchange.

    Key-value heads are repeated where there are not enough to share out.

    Args:
        query: ``[t, A, D]`` of this rank; ``t`` is the same on all ranks.
        key: ``[t, G, D]``.
        value: ``[t, G, D]``.
        group: process group, whose ranks hold the slices of the row in order.

    Returns:
        ``[T, A / P, D]`` and twice ``[T, G' / P, D]``, where ``G'`` is ``G``, or the least common
        multiple of ``G`` and ``P``.

    Raises:
        ValueError: if the query heads cannot be shared out.
    """
    num_ranks = dist.get_world_size(group)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads % num_ranks:
        raise ValueError(
            f"{num_ranks} ranks of a sequence cannot share {num_heads} query heads evenly; choose "
            f"a number of ranks that divides {num_heads}"
        )
    repeats = lcm(num_kv_heads, num_ranks) // num_kv_heads
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    tensors = (query, key, value)
    shares = [x.reshape(len(x), num_ranks, -1) for x in tensors]
    sizes = [share.shape[2] for share in shares]
    sent = torch.cat(shares, dim=2).transpose(0, 1).contiguous()
    received = _Exchange.apply(sent, group).flatten(0, 1).split(sizes, dim=1)
    q, k, v = (r.unflatten(1, (-1, x.shape[2])) for r, x in zip(received, tensors, strict=True))
    return q, k, v


def gather_heads(attended: Tensor, *, group: Any) -> Tensor:
    """Give every rank all heads of its tokens: ``[T, A / P, D]`` to ``[t, A, D]``."""
    num_ranks = dist.get_world_size(group)
    sent = attended.reshape(num_ranks, -1, *attended.shape[1:]).contiguous()
    return _Exchange.apply(sent, group).transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Row ``p`` of ``[P, ...]`` goes to rank p, whose row for this rank takes its place.

    The exchange is its own inverse and its own transpose, so the gradient takes it too.
    """

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Exchange.apply(gradient.contiguous(), ctx.group), None
