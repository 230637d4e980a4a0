"""The grid of a sweep: which runs there are, in which order, and what makes each one itself."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Value = str | int | float | bool
Axis = Sequence[str] | Mapping[str, Sequence[str]]
"""Overrides with ``{}`` in the place of the value, or the overrides of each value by its name."""

DEFAULT_AXES: Mapping[str, Axis] = {
    "method": ("algorithm={}",),
    "lag": ("lab.exact_lag={}", "staleness.max={}"),
}
"""Axes that are more than one key; any other axis without a meaning of its own is a dotted key."""

_WHAT_A_RUN_DOES = ("steps", "max_seconds", "stop_at_eval_reward")
"""Keys below ``run`` that are part of what it does; the others say where it is and who watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        axes: its place in the grid: value by axis.
        overrides: of the configuration, in their order.
    """

    axes: Mapping[str, Value]
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Return the place in one line."""
        return " ".join(f"{name}={value}" for name, value in self.axes.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Cells that are a product of axes.

    Attributes:
        values: by axis; the first axis varies slowest.
        overrides: of all cells of the block.

    Raises:
        ValueError: if an axis has no value.
    """

    values: Mapping[str, Sequence[Value]]
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if not values:
                raise ValueError(f"axis {name} has no value; name some, or remove it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All runs of a sweep.

    Attributes:
        blocks: in the order in which they are run.
        config: file that all runs build on; None for the defaults.
        overrides: of all runs.
        axes: what the axes mean, besides :data:`DEFAULT_AXES`.
    """

    blocks: tuple[Block, ...]
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    axes: Mapping[str, Axis] = field(default_factory=dict)

    def cells(self) -> tuple[Cell, ...]:
        """Return all runs in their order; one that several blocks have comes once.

        Raises:
            ValueError: if a value of an axis has no meaning.
        """
        cells: dict[tuple[str, ...], Cell] = {}
        for block in self.blocks:
            for values in itertools.product(*block.values.values()):
                axes = dict(zip(block.values, values, strict=True))
                overrides = (
                    *self.overrides,
                    *block.overrides,
                    *itertools.chain.from_iterable(self._meaning(n, v) for n, v in axes.items()),
                )
                cells.setdefault(overrides, Cell(axes=axes, overrides=overrides))
        return tuple(cells.values())

    def _meaning(self, axis: str, value: Value) -> Iterator[str]:
        meaning = self.axes.get(axis) or DEFAULT_AXES.get(axis) or (f"{axis}={{}}",)
        if isinstance(meaning, Mapping):
            if value not in meaning:
                raise ValueError(f"{axis}={value}: one of {', '.join(meaning)}")
            yield from meaning[str(value)]
            return
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield from (override.replace("{}", text) for override in meaning)


def read_sweep(path: Path) -> Sweep:
    """Read a sweep from YAML.

    The file has ``blocks`` (a list of mappings of axis to list of values, and ``overrides``), and
    optionally ``config`` (relative to the file), ``overrides`` and ``axes``.

    Raises:
        ValueError: if it cannot be read, or is of another form.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    known = {"blocks", "config", "overrides", "axes"}
    if not isinstance(content, dict) or not content.get("blocks"):
        raise ValueError(f"{path}: needs blocks, a list of mappings of axis to values")
    if unknown := content.keys() - known:
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}; there are {known}")
    config = content.get("config")
    return Sweep(
        blocks=tuple(_block(block, path) for block in content["blocks"]),
        config=None if config is None else path.parent / config,
        overrides=_texts(content.get("overrides", ()), "overrides", path),
        axes=content.get("axes", {}),
    )


def _block(block: Any, path: Path) -> Block:
    if not isinstance(block, dict):
        raise ValueError(f"{path}: a block must map axes to values, got {block!r}")
    values = {str(k): v for k, v in block.items() if k != "overrides"}
    for name, listed in values.items():
        if not isinstance(listed, list):
            raise ValueError(f"{path}: axis {name} needs a list of values, got {listed!r}")
    return Block(values=values, overrides=_texts(block.get("overrides", ()), "overrides", path))


def _texts(values: Iterable[Any], name: str, path: Path) -> tuple[str, ...]:
    texts = tuple(values)
    if wrong := [v for v in texts if not isinstance(v, str)]:
        raise ValueError(f"{path}: {name} must be texts like key=value, got {wrong[0]!r}")
    return texts


def digest(config: Mapping[str, Any]) -> str:
    """Return what is equal for two runs that do the same.

    Args:
        config: what differs from the defaults, by section; so keys that a later version of the
            code adds change nothing.
    """
    run = {k: v for k, v in config.get("run", {}).items() if k in _WHAT_A_RUN_DOES}
    parts = {k: v for k, v in config.items() if k not in ("run", "logging")}
    text = json.dumps({**parts, "run": run}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
