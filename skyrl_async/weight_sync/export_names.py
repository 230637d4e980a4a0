"""Under which names, and in which pieces, a model's parameters are in Hugging Face files.

`transformers` keeps some weights in memory otherwise than in files: the experts of a layer are one
parameter ``mlp.experts.gate_up_proj [experts, 2 * width, hidden]``, while files, and SGLang, have
``mlp.experts.3.up_proj.weight [width, hidden]``. Every piece is a view of one parameter, so what is
published is copied once, as without such pieces.

The table comes from `transformers` itself: it is asked to convert parameters without storage to
what it would save, and each result shows which part of which parameter it looks at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedPart:
    """One published tensor: a view of one parameter.

    Attributes:
        name: published.
        source: the parameter's name in the model.
        shape: published.
        stride: in elements of the contiguous parameter.
        offset: of the first element, in elements of the contiguous parameter.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def view(self, parameter: Tensor) -> Tensor:
        """Return the part of ``parameter`` (contiguous) that is published; it shares its memory."""
        start = parameter.storage_offset() + self.offset
        return parameter.as_strided(self.shape, self.stride, start)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportNames:
    """How all parameters of a model are published; see :func:`export_names`.

    Attributes:
        shapes: of the model's parameters, by their names in the model.
        parts: in the order of the parameters.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parts: tuple[ExportedPart, ...]
    _by_source: dict[str, list[ExportedPart]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_source: dict[str, list[ExportedPart]] = {name: [] for name in self.shapes}
        for part in self.parts:
            by_source[part.source].append(part)
        for name, shape in self.shapes.items():
            published = sum(math.prod(part.shape) for part in by_source[name])
            if published != math.prod(shape):
                raise ValueError(
                    f"parameter {name!r} has {math.prod(shape)} elements, of which {published} "
                    "are published; every element must be, once"
                )
        object.__setattr__(self, "_by_source", by_source)

    def published(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that one parameter is published as.

        Args:
            name: of the parameter in the model.
            parameter: whole; contiguous, or else a contiguous copy of it is published.

        Raises:
            ValueError: if the model has no such parameter, or it has another shape.
        """
        if name not in self.shapes:
            raise ValueError(f"unknown parameter {name!r}: the model has no such parameter")
        if tuple(parameter.shape) != self.shapes[name]:
            raise ValueError(
                f"parameter {name!r} must be {self.shapes[name]}, got {tuple(parameter.shape)}"
            )
        whole = parameter.detach().contiguous()
        for part in self._by_source[name]:
            yield part.name, part.view(whole)

    def publish(
        self, named_parameters: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that is published, in order.

        Args:
            named_parameters: for example ``model.named_parameters()``.

        Raises:
            ValueError: as :meth:`published`.
        """
        for name, parameter in named_parameters:
            yield from self.published(name, parameter)

    def restore(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters, by their names in the model, from what was published.

        Raises:
            ValueError: if a tensor is missing, unknown, or has another shape.
        """
        unknown = published.keys() - {part.name for part in self.parts}
        if unknown:
            raise ValueError(f"unknown tensor {min(unknown)!r}: the model publishes no such tensor")
        restored: dict[str, Tensor] = {}
        for part in self.parts:
            tensor = published.get(part.name)
            if tensor is None:
                raise ValueError(f"missing tensor {part.name!r}")
            if tuple(tensor.shape) != part.shape:
                raise ValueError(
                    f"tensor {part.name!r} must be {part.shape}, got {tuple(tensor.shape)}"
                )
            if part.source not in restored:
                restored[part.source] = tensor.new_empty(self.shapes[part.source])
            part.view(restored[part.source]).copy_(tensor)
        return restored


def export_names(model: Any) -> ExportNames:
    """Find out how the parameters of a `transformers` model are in Hugging Face files.

    Args:
        model: with weights or on the meta device; only names and shapes are used. What a checkpoint
            that it was loaded from called its parameters makes no difference.

    Raises:
        ValueError: if a parameter is in files otherwise than in pieces of it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    sources = {
        name: torch.empty(p.shape, dtype=p.dtype, device="meta")
        for name, p in model.named_parameters()
    }
    owners = {_storage(tensor): name for name, tensor in sources.items()}
    # A loaded model remembers the names of its checkpoint, which no other process knows.
    unloaded = copy.copy(model)
    unloaded.__dict__.pop("_weight_conversions", None)
    with _WithoutCopies():
        saved = revert_weight_conversion(unloaded, dict(sources))
    parts: dict[str, list[ExportedPart]] = {name: [] for name in sources}
    for name, tensor in saved.items():
        source = owners.get(_storage(tensor))
        if source is None:
            raise ValueError(
                f"{type(model).__name__} saves {name!r} as a mixture of its parameters, which "
                "cannot be published piece by piece; use engine.kind=embedded"
            )
        part = ExportedPart(
            name=name,
            source=source,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=tensor.storage_offset(),
        )
        parts[source].append(part)
    return ExportNames(
        shapes={name: tuple(tensor.shape) for name, tensor in sources.items()},
        parts=tuple(part for of_source in parts.values() for part in of_source),
    )


class _WithoutCopies(TorchFunctionMode):
    """Skips copies that only change the order of elements in memory, so that views stay views."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.contiguous or func is torch.Tensor.clone:
            return args[0]
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """Return what all views of the same memory share, also where there is no memory."""
    return tensor.untyped_storage()._cdata
