"""From where a run goes on, and whether its configuration allows that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_async.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    CheckpointError,
    Manifest,
    newest_whole,
    read_manifest,
)
from skyrl_async.config import Config
from skyrl_async.config_keys import FREE_KEYS, show
from skyrl_async.config_yaml import parse

FIXED_KEYS = (
    "seed",
    "environment.name",
    "environment.options",
    "model.path",
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "critic.kind",
    "lora.rank",
    "lora.alpha",
    "lora.target_modules",
)
"""What a run that goes on cannot change: the tasks that it plays, and what its weights are."""

_ABOUT_THE_FOLDER = ("run.dir", "run.name", "run.resume")
_BUILT_IN_ONLY = ("model.hidden_size", "model.num_layers", "model.num_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """A whole checkpoint that fits the configuration.

    Attributes:
        checkpoint: its folder.
        manifest: of it.
        passed_over: newer checkpoints that are not whole, and why.
        changes: keys that differ from those of the checkpoint.
    """

    checkpoint: Path
    manifest: Manifest
    passed_over: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that wrote the checkpoint, if it lies in one."""
        above = self.checkpoint.parent
        return above.parent if above.name == CHECKPOINTS else None


def find_resume(config: Config) -> Resume | None:
    """Return from where ``run.resume`` goes on; None for a run that starts anew.

    Raises:
        CheckpointError: if a folder that it names has no whole checkpoint.
        ValueError: if a key has changed that cannot.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        found, passed_over = newest_whole(Path(str(config.run.dir)).expanduser() / CHECKPOINTS)
        if found is None:
            return None
        checkpoint, manifest = found
    else:
        try:
            checkpoint, manifest, passed_over = _named(Path(config.run.resume).expanduser())
        except CheckpointError as error:
            raise CheckpointError(f"run.resume={config.run.resume}: {error}") from None
    return Resume(
        checkpoint=checkpoint.resolve(),
        manifest=manifest,
        passed_over=passed_over,
        changes=tuple(_changes(config, checkpoint)),
    )


def start_version(resume: Resume | None) -> int:
    """Return the policy version from which a run goes on, 0 at its start."""
    return 0 if resume is None else resume.manifest.policy_version


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint, or the newest whole one of a run.

    Raises:
        CheckpointError: if it is not whole, or there is none.
    """
    return _named(path)[0]


def _named(path: Path) -> tuple[Path, Manifest, tuple[str, ...]]:
    if (path / MANIFEST).exists():
        return path, read_manifest(path), ()
    found, passed_over = newest_whole(path / CHECKPOINTS)
    if found is None:
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise CheckpointError(
            f"{path}: no whole checkpoint there{why}; give the folder of a run or of a checkpoint"
        )
    return (*found, passed_over)


def _changes(config: Config, checkpoint: Path) -> Iterator[str]:
    """Yield a line for every key that differs from the checkpoint's.

    Raises:
        ValueError: naming all that cannot.
    """
    before = dict(_flat(parse((checkpoint / CONFIG).read_text(encoding="utf-8")).data or {}))
    now = dict(_flat(config.model_dump(mode="json")))
    changed = [key for key in now if key in before and before[key] != now[key]]
    if before.get("model.path") is not None and now["model.path"] is not None:
        changed = [key for key in changed if key not in _BUILT_IN_ONLY]
    refused = [key for key in changed if key in FIXED_KEYS]
    if refused:
        pairs = (f"{key} was {show(before[key])}, is {show(now[key])}" for key in refused)
        raise ValueError(
            f"run.resume={config.run.resume}: cannot go on from {checkpoint} with "
            f"{'; '.join(pairs)}: set what it was, or start a new run"
        )
    for key in changed:
        if key not in _ABOUT_THE_FOLDER:
            yield f"{key}={show(now[key])}, it was {show(before[key])}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted paths and values; free mappings stay whole."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and path not in FREE_KEYS:
            yield from _flat(value, f"{path}.")
        else:
            yield path, value
