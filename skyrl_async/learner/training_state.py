"""What a learner must keep to go on training: written by all ranks, read by any number of them.

A state is written with ``torch.distributed.checkpoint``: every rank writes its own shards, and a
reader takes from them whatever its ranks hold, sharded or not. Only what is trained is written, so
that frozen base weights stay where they are. Hyperparameters of the optimizer (rates, decay) are
not written either: those of the run that goes on apply.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

COUNTERS = "counters.json"
_POLICY, _CRITIC = "policy", "critic"

Counters = Mapping[str, int | float]
"""Numbers of the learner that are no tensors, such as ``policy_version``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The parts of a learner that training changes.

    Attributes:
        module: the policy, sharded or not; what requires no gradient is not written.
        optimizer: of its trained parameters.
        critic_module: with the trained parameters of the critic, if there is one.
        critic_optimizer: of these.
        counters: numbers to go on from.
    """

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    critic_module: torch.nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    counters: Counters = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that module and optimizer of the critic come together.

        Raises:
            ValueError: if only one of them is given.
        """
        if (self.critic_module is None) != (self.critic_optimizer is None):
            raise ValueError("critic_module and critic_optimizer must be given together")

    def parts(self) -> Iterator[tuple[str, torch.nn.Module, torch.optim.Optimizer]]:
        """Yield name, module and optimizer of policy and critic."""
        yield _POLICY, self.module, self.optimizer
        if self.critic_module is not None and self.critic_optimizer is not None:
            yield _CRITIC, self.critic_module, self.critic_optimizer


class StateWriter:
    """Writes states in the background, one at a time; every rank has one.

    ::

        writer = StateWriter(rank=rank, num_ranks=num_ranks, timeout_s=600)
        writer.start(learner.training_state(), folder)   # training may go on when this returns
        seconds = writer.finish()                        # all ranks have written and synced

    Args:
        rank: of this process in the default process group.
        num_ranks: that write together; with several the default process group must exist, and all
            of them must make their writers at the same point.
        timeout_s: of each exchange between the ranks.
    """

    def __init__(self, *, rank: int = 0, num_ranks: int = 1, timeout_s: float = 600) -> None:
        self._rank = rank
        self._writing: Future[Any] | None = None
        self._started_s = 0.0
        self._ended_s = 0.0
        self._group: Any = None
        if num_ranks > 1:
            # The background thread needs a group of its own: training uses the other meanwhile.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def start(self, state: TrainingState, folder: Path) -> None:
        """Copy the state and begin to write it into ``folder``, which all ranks share.

        Raises:
            RuntimeError: if the one before was not finished.
        """
        if self._writing is not None:
            raise RuntimeError("a state is being written; finish it before the next is started")
        self._started_s = time.monotonic()
        folder.mkdir(exist_ok=True)
        if self._rank == 0:
            _write_synced(folder / COUNTERS, json.dumps(dict(state.counters)))
        tensors = _trained(state) | {f"rng.{self._rank}": _random_states()}
        _hide_warning()
        writing: Any = dcp.async_save(
            tensors,
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._writing = writing
        writing.add_done_callback(self._note_end)

    def finish(self) -> float:
        """Wait until the state is written and synced; return the seconds since ``start``.

        Raises:
            RuntimeError: if nothing was started.
            OSError: if a rank could not write.
        """
        if self._writing is None:
            raise RuntimeError("no state is being written")
        try:
            self._writing.result()
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank} could not write: {cause}") from cause
        finally:
            self._writing = None
        return self._ended_s - self._started_s

    def _note_end(self, _: Future[Any]) -> None:
        self._ended_s = time.monotonic()


def load_training_state(
    state: TrainingState, folder: Path, *, rank: int = 0, num_ranks: int = 1
) -> Counters:
    """Load what :class:`StateWriter` wrote into modules and optimizers, and return the counters.

    The number of ranks, and how each module is sharded, may differ from those that wrote. All ranks
    must call it. Random states come back on the ranks that wrote one; others keep theirs.

    Args:
        state: to load into; its counters are not used.
        folder: where it was written.
        rank: of this process.
        num_ranks: that load together.

    Raises:
        ValueError: if the weights there are not those of these modules.
        OSError: if it cannot be read.
    """
    written = _written_keys(folder)
    tensors = _trained(state, for_reading=True)
    for name, module, _ in state.parts():
        _check_names(name, module, tensors[name], written, folder)
    for name, _, optimizer in state.parts():
        moments = tensors[f"{name}_optimizer"]
        if not any(key.startswith(f"{name}_optimizer.") for key in written):
            # It had not taken a step yet.
            optimizer.state.clear()
            del tensors[f"{name}_optimizer"]
            continue
        for parameter, values in moments.items():
            for key in [k for k in values if f"{name}_optimizer.{parameter}.{k}" not in written]:
                del values[key]
    own = f"rng.{rank}"
    if any(key.startswith(f"{own}.") for key in written):
        tensors[own] = {k: v for k, v in _random_states().items() if f"{own}.{k}" in written}
    _read(tensors, folder, distributed=num_ranks > 1)
    for name, module, optimizer in state.parts():
        set_model_state_dict(module, tensors[name], options=_options(strict=False))
        if f"{name}_optimizer" in tensors:
            _set_moments(module, optimizer, tensors[f"{name}_optimizer"])
    _restore_random_states(tensors.get(own, {}))
    counters: Counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    return counters


def load_policy_weights(module: torch.nn.Module, folder: Path) -> None:
    """Load only the policy's trained weights, in one process; what is frozen stays as it is.

    Raises:
        ValueError: if the weights there are not those of the module.
        OSError: if they cannot be read.
    """
    weights = _model_part(module)
    _check_names(_POLICY, module, weights, _written_keys(folder), folder)
    _read({_POLICY: weights}, folder, distributed=False)
    set_model_state_dict(module, weights, options=_options(strict=False))


def _trained(state: TrainingState, *, for_reading: bool = False) -> dict[str, dict[str, Any]]:
    """Return all tensors of a state, as this rank holds them; they are those in use, not copies."""
    tensors: dict[str, dict[str, Any]] = {}
    for name, module, optimizer in state.parts():
        tensors[name] = _model_part(module)
        # Without moments yet, asking for them would make some, by a step with gradients of 0.
        if optimizer.state or for_reading:
            moments: Any = get_optimizer_state_dict(module, optimizer)
            tensors[f"{name}_optimizer"] = moments["state"]
    return tensors


def _model_part(module: torch.nn.Module) -> dict[str, Any]:
    """Return the trained weights and the buffers by name; of tied weights, only the first name."""
    names = {name for name, _ in module.named_parameters()}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    weights = get_model_state_dict(module, options=_options())
    return {name: value for name, value in weights.items() if name not in tied}


def _options(*, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=strict)


def _set_moments(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Any]
) -> None:
    """Give the optimizer its moments, under the hyperparameters that it has now."""
    present: Any = get_optimizer_state_dict(module, optimizer)
    set_optimizer_state_dict(
        module, optimizer, {"state": moments, "param_groups": present["param_groups"]}
    )


def _written_keys(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of a written state.

    Raises:
        OSError: if it cannot be read.
    """
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: tuple(getattr(entry, "size", ())) for key, entry in metadata.items()}


def _check_names(
    part: str,
    module: torch.nn.Module,
    weights: Mapping[str, Tensor],
    written: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    here = {f"{part}.{name}": tuple(tensor.shape) for name, tensor in weights.items()}
    there = {k: v for k, v in written.items() if k.startswith(f"{part}.")}
    if here == there:
        return
    key = min(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    shapes = [list(s[key]) if key in s else "absent" for s in (there, here)]
    raise ValueError(
        f"{folder}: holds another {part}: {key.partition('.')[2]} is {shapes[0]} there and "
        f"{shapes[1]} in this {type(module).__name__}; resume with the same model and the same "
        "trained parameters"
    )


def _read(tensors: dict[str, Any], folder: Path, *, distributed: bool) -> None:
    _hide_warning()
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=not distributed)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: rank {rank} could not read: {cause}") from cause


def _random_states() -> dict[str, Tensor]:
    """Return the state of every random generator of this process, as bytes."""
    generator = np.random.get_state(legacy=False)
    numpy_state = {**generator, "state": {k: _plain(v) for k, v in generator["state"].items()}}
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _as_bytes(numpy_state),
        "python": _as_bytes(random.getstate()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    if not states:
        return
    torch.set_rng_state(states["torch"])
    np.random.set_state(_from_bytes(states["numpy"]))
    version, numbers, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _as_bytes(value: Any) -> Tensor:
    # Padded, because a number has more digits at one time than at another.
    return torch.frombuffer(bytearray(json.dumps(value).encode().ljust(16384)), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.numpy()))


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _hide_warning() -> None:
    """Hide the warning that one process is no process group; the background thread gives it too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
