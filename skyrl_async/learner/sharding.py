"""Sharding a module's weights over the learner group with FSDP2, and the type that it computes in.

Every decoder layer is a group of its own, gathered while it runs; embeddings, the last norm and the
head are gathered with the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skyrl_async.learner.rank_group import RankGroup

FillParameters = Callable[[Iterable[tuple[str, Tensor]]], None]
"""Writes initial weights into the parameters of those names, whole or sharded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSettings:
    """How a module lies in memory and what it computes in.

    Attributes:
        compute_dtype: of the matrix products; weights, their gradients and the optimizer's state
            stay as they are, in float32.
        float32_head: embeddings, the last norm and the head compute in float32 all the same.
        activation_checkpointing: keep only the input of each decoder layer for the backward pass
            and compute the rest again.
        offload: weights, gradients and the optimizer's state wait in host memory; for a GPU.
    """

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    float32_head: bool = False
    activation_checkpointing: bool = False
    offload: bool = False

    def needs_fsdp(self, ranks: RankGroup) -> bool:
        """Whether the module cannot just be kept as it is on every rank."""
        return ranks.shard_ranks > 1 or self.compute_dtype != "float32" or self.offload


def prepare(
    module: nn.Module,
    settings: ShardingSettings,
    ranks: RankGroup,
    *,
    fill: FillParameters | None = None,
    names: Callable[[str], str | None] = lambda name: name,
    whole: Collection[nn.Parameter] = (),
) -> bool:
    """Put ``module`` into its place in memory, in place; return whether it is sharded.

    Gradients of a sharded module are sums over all ranks after each backward pass, and a rank has
    its own part of them only. Those of any other module are the rank's own.

    Args:
        module: with its weights, or with parameters on the ``meta`` device.
        settings: how.
        ranks: of the learner group; all of them call this.
        fill: writes the initial weights if the parameters have none yet.
        names: from a parameter's name in ``module`` to the one that ``fill`` knows it by; None for
            a parameter that the caller sets.
        whole: parameters that every rank keeps, with gradients of its own: adapters are small, and
            merging them then needs no other rank.

    Raises:
        ValueError: if the weights are missing and nothing fills them.
    """
    if settings.activation_checkpointing:
        for layer in decoder_layers(module):
            # The forward method alone, so that no parameter changes its name.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    on_meta = any(p.is_meta for p in module.parameters())
    if on_meta and fill is None:
        raise ValueError("the module has no weights, and nothing to fill them with")
    sharded = settings.needs_fsdp(ranks)
    if sharded:
        _fully_shard(module, settings, ranks, whole=set(whole))
    # FSDP looks at the types when it first runs; with offloading it moves weights by itself.
    place = torch.device("cpu") if settings.offload else ranks.device
    if on_meta:
        _allocate(module, place)
        assert fill is not None
        known = ((names(name), p) for name, p in module.named_parameters())
        fill((name, p) for name, p in known if name is not None)
    elif not sharded:
        module.to(place)
    else:
        for parameter in whole:
            parameter.data = parameter.data.to(ranks.device)
    return sharded


def decoder_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that ``transformers`` says must not be split, in the order of the model.

    Raises:
        ValueError: if the model does not say which those are.
    """
    classes = {
        name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()
    }
    layers = [part for part in module.modules() if type(part).__name__ in classes]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} names no decoder layers (_no_split_modules), so that it can "
            "be neither sharded nor checkpointed; use one rank and no activation checkpointing"
        )
    yield from layers


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a parameter, and which row of the whole is the first of them.

    The rows are the parameter's own memory. A parameter without shards has all of them.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor: Any = parameter
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, placements
    )
    local = tensor.to_local().detach()
    return local.view(shape), offset[0] if offset else 0


def _fully_shard(
    module: nn.Module, settings: ShardingSettings, ranks: RankGroup, *, whole: set[nn.Parameter]
) -> None:
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    compute = getattr(torch, settings.compute_dtype)
    lower = None if compute is torch.float32 else compute
    own_dtype = next(module.parameters()).dtype
    reduce_dtype = torch.float32 if lower is not None else None
    if own_dtype is torch.float64:
        lower = reduce_dtype = None
    inner = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=reduce_dtype)
    outer = inner if not settings.float32_head else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()
    common: dict[str, Any] = {
        "mesh": ranks.mesh(),
        "offload_policy": offload,
        "ignored_params": whole,
    }
    layers = list(decoder_layers(module))
    for layer in layers:
        fully_shard(layer, mp_policy=inner, **common)
    root: Any = fully_shard(module, mp_policy=outer, **common)
    for part in (*layers, root):
        # Sums, as every token's share in the loss is its share in the whole minibatch.
        part.set_gradient_divide_factor(1.0)
        if ranks.device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give memory to parameters on the meta device; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
