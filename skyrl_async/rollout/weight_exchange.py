"""Replacing all parameters of a model by given tensors, without copying them on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_HOST = torch.device("cpu")


def exchange_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make the given tensors the parameters of ``model``; time grows with their number, not size.

    The old tensors are not referred to afterwards. Until the next exchange the given ones belong
    to the model and must not be written to.

    Tensors in host memory of a model on another device are copied into its parameters instead (fast
    from page-locked memory); the copies are done when this returns, and no memory of the device is
    needed beside the parameters.

    Args:
        model: whose parameters are replaced, all of them.
        weights: by parameter name. A tied parameter may be given under each of its names, if the
            values are equal. On the model's device, or all in host memory.

    Raises:
        ValueError: if a name is missing or unknown, or a shape, dtype or device is wrong, or tied
            names differ in value; then nothing was changed.
    """
    canonical: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(parameter), name)
        if first == name:
            parameters[name] = parameter
        else:
            aliases[name] = first
    chosen: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        target = aliases.get(name, name)
        if target not in parameters:
            raise ValueError(f"unknown parameter {name!r}: the model has no such parameter")
        _check_like(name, tensor, parameters[target])
        other = chosen.setdefault(target, tensor)
        if other.data_ptr() != tensor.data_ptr() and not torch.equal(other, tensor):
            raise ValueError(f"parameter {name!r} is tied to another name but its values differ")
    missing = parameters.keys() - chosen.keys()
    if missing:
        raise ValueError(f"missing parameter {min(missing)!r} ({len(missing)} missing in all)")
    _exchange([(parameter, chosen[name].detach()) for name, parameter in parameters.items()])


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    copied = None
    for parameter, tensor in pairs:
        if tensor.device == parameter.device:
            parameter.data = tensor
        else:
            parameter.copy_(tensor, non_blocking=True)
            copied = parameter.device
    if copied is not None and copied.type == "cuda":
        torch.cuda.current_stream(copied).synchronize()


def _check_like(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    if (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype) and (
        tensor.device in (parameter.device, _HOST)
    ):
        return
    raise ValueError(
        f"parameter {name!r} must be {tuple(parameter.shape)} {parameter.dtype} on "
        f"{parameter.device} or in host memory, got {tuple(tensor.shape)} {tensor.dtype} on "
        f"{tensor.device}"
    )
