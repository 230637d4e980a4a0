"""Initial weights of a sharded policy: every rank reads the rows that it keeps, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrl_async.learner.policy import PolicySource, load_model
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sharding import FillParameters, local_rows

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_reader(source: PolicySource, ranks: RankGroup) -> FillParameters:
    """Return what writes a model folder's weights into parameters, whole or sharded by rows.

    Ranks read their rows from the safetensors. Where these hold other tensors than the module, as
    with experts that the module fuses, or where the folder has none, rank 0 loads the model and
    sends one tensor after the other; then no other rank ever holds all of it either.

    Args:
        source: with a path.
        ranks: of the learner group; all of them call the returned function.

    Raises:
        ValueError: from the returned function, if a tensor is missing or has another shape.
    """
    return partial(_fill, source, ranks)


def _fill(source: PolicySource, ranks: RankGroup, named: Iterable[tuple[str, Tensor]]) -> None:
    parameters = list(named)
    files = tensor_files(Path(source.path or ""))
    if all(name in files for name, _ in parameters):
        _read_rows(files, parameters)
    else:
        _receive(source, ranks, parameters)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of every tensor of a model folder; none if it has no such file.

    Raises:
        ValueError: if the index is broken.
    """
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        try:
            places: Mapping[str, str] = json.loads((folder / _INDEX).read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"model.path={folder}: {_INDEX} is broken ({error}); copy the model again"
            ) from error
        return {name: folder / file for name, file in places.items()}
    if not (folder / _SINGLE).is_file():
        return {}
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


@torch.no_grad()
def _read_rows(files: Mapping[str, Path], parameters: Iterable[tuple[str, Tensor]]) -> None:
    from safetensors import safe_open

    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, parameter in parameters:
            path = files[name]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            stored = opened[path].get_slice(name)
            _check_shape(name, tuple(stored.get_shape()), parameter)
            rows, start = local_rows(parameter)
            if rows.numel():
                rows.copy_(stored[start : start + len(rows)] if rows.ndim else stored[()])


@torch.no_grad()
def _receive(
    source: PolicySource, ranks: RankGroup, parameters: Iterable[tuple[str, Tensor]]
) -> None:
    whole: dict[str, Tensor] = {}
    if ranks.rank == 0:
        model = load_model(source)
        whole = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        if ranks.rank == 0 and name not in whole:
            raise ValueError(f"model.path={source.path}: the model has no parameter {name}")
        tensor = whole[name].detach() if ranks.rank == 0 else torch.empty(parameter.shape)
        _check_shape(name, tuple(tensor.shape), parameter)
        tensor = ranks.broadcast_(tensor.to(dtype=parameter.dtype))
        rows, start = local_rows(parameter)
        if rows.numel():
            rows.copy_(tensor[start : start + len(rows)] if rows.ndim else tensor)


def _check_shape(name: str, stored: tuple[int, ...], parameter: Tensor) -> None:
    if stored != tuple(parameter.shape):
        raise ValueError(
            f"{name} has shape {list(stored)} in the model folder, and {list(parameter.shape)} in "
            "the model that its config.json describes; copy both from one place"
        )
