"""Replacing all parameters of a model by given tensors, without copying them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def exchange_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make the given tensors the parameters of ``model``; time grows with their number, not size.

    The old tensors are not referred to afterwards. Until the next exchange the given ones belong
    to the model and must not be written to.

    Args:
        model: whose parameters are replaced, all of them.
        weights: by parameter name. A tied parameter may be given under each of its names, if the
            values are equal.

    Raises:
        ValueError: if a name is missing or unknown, or a shape, dtype or device differs, or tied
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
    for name, parameter in parameters.items():
        parameter.data = chosen[name].detach()


def _check_like(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    given = (tuple(tensor.shape), tensor.dtype, tensor.device)
    expected = (tuple(parameter.shape), parameter.dtype, parameter.device)
    if given != expected:
        raise ValueError(
            f"parameter {name!r} must be {expected[0]} {expected[1]} on {expected[2]}, "
            f"got {given[0]} {given[1]} on {given[2]}"
        )
