"""Low-rank adapters into an SGLang server: its weights stay, and each version has a name.

A request names its adapter and keeps it to its end, so that a version is not swapped but begins::

    load_lora_adapter v7 ──► new requests name v7 ──► unload_lora_adapter v5

====================  ==================================  ======================================
``kv_after_swap``     running requests                    adapters loaded at once
====================  ==================================  ======================================
``recompute``         end where they are; their callers   the newest two
                      go on from their tokens with v7
``keep``              go on with the adapter that they    the newest four; if one still needs a
                      named                               fifth, all end where they are
====================  ==================================  ======================================

Adapters are handed over as a folder in memory, which the server forgets when it has loaded it.
An adapter that SGLang makes of tensors in shared memory changes with that memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from skyrl_async.weight_sync.sglang_loader import EngineBroken, LoadReport

logger = logging.getLogger(__name__)

LOADED_AT_ONCE: Mapping[str, int] = {"recompute": 2, "keep": 4}
"""Adapters of a server between two loads, by ``kv_after_swap``."""

_SHARED_MEMORY = Path("/dev/shm")
_GRACE_S = 0.5
"""Requests that need an adapter may end by themselves for so long."""

_SIDES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What all versions of an adapter have in common.

    Attributes:
        rank: of each pair of sides.
        alpha: their product is multiplied by ``alpha / rank``.

    Raises:
        ValueError: if one is not positive.
    """

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank and alpha must be > 0, got {self.rank} and {self.alpha}")


def check_adapter(adapter: Mapping[str, Tensor], *, rank: int) -> tuple[str, ...]:
    """Return the last parts of the names of the adapted layers, sorted.

    A server that is given sides which do not fit each other ends when a request first needs them.

    Args:
        adapter: ``A [rank, in_features]`` and ``B [out_features, rank]`` of every adapted layer, by
            the names of the `peft` library.
        rank: of all of them.

    Raises:
        ValueError: naming the first side that is missing, unknown or of another shape.
    """
    modules: set[str] = set()
    for name, side in adapter.items():
        end = next((e for e in _SIDES if name.endswith(e)), None)
        if end is None:
            raise ValueError(f"{name!r} is no side of an adapter; names end with {_SIDES}")
        layer = name.removesuffix(end)
        missing = next((layer + e for e in _SIDES if layer + e not in adapter), None)
        if missing is not None:
            raise ValueError(f"the adapter has {name!r}, but not {missing!r}")
        if side.ndim != 2 or side.shape[_SIDES.index(end)] != rank:
            raise ValueError(f"{name!r} has the shape {tuple(side.shape)}, not that of rank {rank}")
        modules.add(layer.rpartition(".")[2])
    if not modules:
        raise ValueError("an adapter needs at least one adapted layer, got none")
    return tuple(sorted(modules))


class AdapterLoader:
    """Loads verified adapters into one server, and unloads what no request needs any more.

    ::

        loader = AdapterLoader(control, settings=settings, kv_after_swap="recompute",
                               name_of=adapter_name, is_ours=...)
        await loader.load(adapter, policy_version=7, timeout_s=60)

    Args:
        control: of the server, which must have been started for adapters of this rank.
        settings: of all adapters.
        kv_after_swap: what happens to running requests.
        name_of: gives the name that requests use for a version.
        is_ours: tells such names from those of adapters that are somebody else's.
        scratch: folder of a memory file system that the server sees too.
    """

    def __init__(
        self,
        control: SglangControl,
        *,
        settings: AdapterSettings,
        kv_after_swap: Literal["recompute", "keep"],
        name_of: Callable[[int], str],
        is_ours: Callable[[str], bool],
        scratch: Path = _SHARED_MEMORY,
    ) -> None:
        self._control = control
        self._settings = settings
        self._recompute = kv_after_swap == "recompute"
        self._num_kept = LOADED_AT_ONCE[kv_after_swap]
        self._name_of = name_of
        self._is_ours = is_ours
        self._scratch = scratch
        self._loaded: list[str] = []

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that this loader has loaded and not unloaded, oldest first."""
        return tuple(self._loaded)

    async def load(
        self, weights: Mapping[str, Tensor], *, policy_version: int, timeout_s: float
    ) -> LoadReport:
        """Make the adapter known to the server, and old ones unknown.

        Args:
            weights: of the adapter; see :func:`check_adapter`.
            policy_version: of it.
            timeout_s: for everything.

        Returns:
            With the time of the load itself as the stall, which is an upper limit.

        Raises:
            ValueError: if the adapter's names or shapes are wrong; the server has not seen it.
            ControlError: if the server refused it; all else is as it was.
            EngineBroken: if the server did not answer, so that nobody knows what it has loaded.
        """
        started = time.monotonic()
        deadline = started + timeout_s
        name = self._name_of(policy_version)
        modules = check_adapter(weights, rank=self._settings.rank)
        try:
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="adapter-") as folder:
                await asyncio.to_thread(self._write, weights, modules, Path(folder))
                prepared = time.monotonic()
                present = await self._load(name, folder, deadline)
            self._loaded = [*(other for other in self._loaded if other != name), name]
            if self._recompute:
                await self._control.abort_all(timeout_s=deadline - time.monotonic())
            ended = time.monotonic()
            await self._unload_old(present, deadline)
        except ControlError as error:
            if error.status is None:
                raise EngineBroken(f"an adapter load was not answered: {error}") from error
            raise
        return LoadReport(
            policy_version=policy_version, prepare_s=prepared - started, stall_s=ended - prepared
        )

    def _write(self, weights: Mapping[str, Tensor], modules: tuple[str, ...], folder: Path) -> None:
        """Write the folder as the `peft` library would."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "bias": "none",
            "r": self._settings.rank,
            "lora_alpha": self._settings.alpha,
            "target_modules": list(modules),
        }
        save_file(dict(weights), folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    async def _load(self, name: str, folder: str, deadline: float) -> tuple[str, ...]:
        """Return the adapters that the server has then."""
        try:
            present = await self._control.load_adapter(
                name, folder, timeout_s=deadline - time.monotonic()
            )
        except ControlError as error:
            if error.status is None:
                raise
            # Perhaps an earlier run, or this one before its pair was lost, used the same name.
            await self._unload(name, deadline)
            present = await self._control.load_adapter(
                name, folder, timeout_s=deadline - time.monotonic()
            )
        if name not in present:
            raise ControlError(
                f"the server took the adapter {name!r}, but names only {present} as loaded",
                status=200,
            )
        return present

    async def _unload_old(self, present: tuple[str, ...], deadline: float) -> None:
        """Unload all of ours but the newest that this loader has loaded."""
        kept = self._loaded[-self._num_kept :]
        for name in present:
            if self._is_ours(name) and name not in kept:
                await self._unload(name, deadline)
        self._loaded = kept

    async def _unload(self, name: str, deadline: float) -> None:
        """Unload one adapter; requests that need it have a moment to end, and then must."""
        unloading = asyncio.create_task(
            self._control.unload_adapter(name, timeout_s=deadline - time.monotonic())
        )
        try:
            done, _ = await asyncio.wait({unloading}, timeout=_GRACE_S)
            if not done:
                logger.info("requests still need the adapter %s: all requests go on anew", name)
                await self._control.abort_all(timeout_s=deadline - time.monotonic())
            await unloading
        except ControlError as error:
            if error.status is None:
                raise
            logger.info("the adapter %s is not there to be unloaded: %s", name, error)
        finally:
            unloading.cancel()
            with contextlib.suppress(asyncio.CancelledError, ControlError):
                await unloading
