"""Merging low-rank adapters into the weights that they adapt, without changing those.

An adapter of a weight ``W [out, in]`` is a pair ``A [rank, in]`` and ``B [out, rank]`` with a scale
(Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"):

    merged = W + scale * B @ A

Every merge starts from ``W``, so that rounding never adds up from version to version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."
"""Before the model's own names in the files of the `peft` library."""

SIDE_A, SIDE_B = ".lora_A.weight", ".lora_B.weight"
"""Ends of the published names of an adapter's two sides, in place of ``.weight``."""


@torch.no_grad()
def merge(base: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, out: Tensor) -> None:
    """Write ``base + scale * lora_b @ lora_a`` into ``out``, computed in float32 at least.

    Args:
        base: ``[out_features, in_features]``.
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``.
        scale: of the product.
        out: like ``base``, in any type and on any device.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    lora_a, lora_b = (side.to(device=base.device, dtype=dtype) for side in (lora_a, lora_b))
    if out.dtype == dtype and out.device == base.device:
        torch.addmm(base.to(dtype), lora_b, lora_a, alpha=scale, out=out)
    else:
        merged = torch.addmm(base.to(dtype), lora_b, lora_a, alpha=scale)
        # Converted before the copy, so that a copy between devices may run in the background.
        out.copy_(merged.to(out.dtype), non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedWeight:
    """A weight with its adapter, merged only where it is written to.

    Attributes:
        base: ``[out_features, in_features]``; also has the shape of what is merged.
        lora_a: ``[rank, in_features]``.
        lora_b: ``[out_features, rank]``.
        scale: of the product.
    """

    base: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def write_to(self, out: Tensor) -> None:
        """Write the merged weight into ``out``; see :func:`merge`."""
        merge(self.base, self.lora_a, self.lora_b, scale=self.scale, out=out)

    def tensor(self) -> Tensor:
        """Return the merged weight, in the type of the base."""
        out = torch.empty_like(self.base, requires_grad=False)
        self.write_to(out)
        return out


class AdapterMerger:
    """Makes the weights of an engine from its base weights and adapters that arrive alone.

    The weights that a model has now are the base for good. Merged ones are written to two sets of
    tensors in turn, because those of one version are in use until the next is loaded.

    Args:
        model: of the engine, with the weights that the adapters belong to.
        scale: of every adapter, ``alpha / rank``.
    """

    def __init__(self, model: nn.Module, *, scale: float) -> None:
        self._base = {name: p.detach() for name, p in model.named_parameters()}
        self._scale = scale
        self._sets: list[dict[str, Tensor]] = [{}, {}]

    def merge(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parameters of the model, those with an adapter merged.

        They stay as they are until the call after the next one.

        Args:
            adapter: both sides of every adapted weight, by the names of the `peft` library.

        Raises:
            ValueError: if a side is missing, belongs to no weight, or does not fit it.
        """
        sides = [name for name in adapter if name.endswith(SIDE_A)]
        if len(adapter) != 2 * len(sides):
            raise ValueError(
                f"an adapter needs {SIDE_A} and {SIDE_B} of every weight, got {len(sides)} of the "
                f"former among {len(adapter)} tensors"
            )
        self._sets.reverse()
        merged = self._sets[0]
        weights: dict[str, Tensor] = dict(self._base)
        for name in sides:
            target = name.removeprefix(PEFT_PREFIX).removesuffix(SIDE_A) + ".weight"
            lora_b: Any = adapter.get(name.removesuffix(SIDE_A) + SIDE_B)
            base = self._base.get(target)
            if lora_b is None or base is None:
                raise ValueError(f"{name!r} has no other side, or adapts no weight of the model")
            lora_a = adapter[name]
            if (lora_b.shape[0], lora_a.shape[1]) != tuple(base.shape):
                raise ValueError(
                    f"{name!r}: sides {tuple(lora_a.shape)} and {tuple(lora_b.shape)} do not fit "
                    f"a weight {tuple(base.shape)}"
                )
            if target not in merged:
                merged[target] = torch.empty_like(base)
            merge(base, lora_a, lora_b, scale=self._scale, out=merged[target])
            weights[target] = merged[target]
        return weights
