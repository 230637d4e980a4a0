"""Where every parameter lies in one flat buffer; both ends of a transfer compute the same layout.

Tensors follow each other in order, each at a multiple of 64 bytes (what vectorized kernels want of
live parameters), with zeros between them. The checksum of a version covers the whole flat buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that manifests use, for example ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a name.

    Raises:
        ValueError: if torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown to torch; use a name such as float32")
    return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLayout:
    """Names, types, shapes and places of all published tensors.

    Attributes:
        names: parameter names, in the order of the bytes.
        dtypes: torch dtype names, for example ``float32``.
        shapes: one per name.
        offsets: bytes from the start of the flat buffer.
        size_bytes: of the flat buffer, padding included.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size_bytes: int

    @classmethod
    def of(
        cls, named_parameters: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype | None = None
    ) -> Self:
        """Lay out ``named_parameters`` in their order; tied ones once, under their first name.

        Args:
            named_parameters: for example ``model.named_parameters()``.
            dtype: of the published floating-point tensors; None keeps each one's own.

        Raises:
            ValueError: if there is no parameter, or a name comes twice.
        """
        names: list[str] = []
        dtypes: list[str] = []
        shapes: list[tuple[int, ...]] = []
        offsets: list[int] = []
        end = 0
        for name, tensor in untied(named_parameters):
            published = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            names.append(name)
            dtypes.append(dtype_name(published))
            shapes.append(tuple(tensor.shape))
            offsets.append(end)
            end += -(-tensor.numel() * published.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if not end:
            raise ValueError("there is nothing to publish: give at least one non-empty parameter")
        return cls(
            names=tuple(names),
            dtypes=tuple(dtypes),
            shapes=tuple(shapes),
            offsets=tuple(offsets),
            size_bytes=end,
        )


def untied(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Drop every tensor that is the same memory, seen in the same way, as an earlier one.

    Raises:
        ValueError: if a name comes twice.
    """
    kept: dict[str, Tensor] = {}
    seen: set[object] = set()
    for name, tensor in named_parameters:
        place: object = id(tensor)
        if tensor.numel() and not tensor.is_meta:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place in seen:
            continue
        if name in kept:
            raise ValueError(f"parameter name {name!r} comes twice; names must be unique")
        seen.add(place)
        kept[name] = tensor
    return list(kept.items())


class FlatBuffer:
    """One host buffer with a layout, and the views into it, which are built once.

    Attributes:
        flat: uint8 ``[layout.size_bytes]``.
        tensors: one view per name, in the order of the layout.
        data: the same bytes for ``zlib`` and files.
    """

    __slots__ = ("data", "flat", "tensors")

    def __init__(self, layout: WeightLayout, *, pinned: bool = False, shared: bool = False) -> None:
        """Allocate it.

        Args:
            layout: of the tensors.
            pinned: page-locked, for copies from a GPU.
            shared: named shared memory, which other processes of this machine can be given.
        """
        if shared:
            storage = torch.UntypedStorage._new_using_filename_cpu(layout.size_bytes)
            self.flat = torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
        else:
            self.flat = torch.zeros(layout.size_bytes, dtype=torch.uint8, pin_memory=pinned)
        bytes_of_flat: Any = self.flat.numpy()
        self.data = memoryview(bytes_of_flat)
        self.tensors: dict[str, Tensor] = {}
        places = zip(layout.names, layout.dtypes, layout.shapes, layout.offsets, strict=True)
        for name, type_name, shape, offset in places:
            dtype = dtype_of(type_name)
            end = offset + math.prod(shape) * dtype.itemsize
            self.tensors[name] = self.flat[offset:end].view(dtype).view(shape)
