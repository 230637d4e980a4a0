"""Checkpoint folders: whole or not there at all, whenever the process is killed.

A checkpoint is written into a hidden folder, synced, and renamed as the last thing::

    checkpoints/.step-000120.<random>.partial/   begin(): whatever fails or is killed leaves this
    checkpoints/step-000120/                     commit(): learner/, run.json, config.yaml, manifest

The manifest lists the size of every file, so that a folder that lost one later is found out when it
is read. Nothing here knows what the files mean, and no heavy library is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
CHECKPOINTS = "checkpoints"
"""Name of the folder, in that of the run, which holds its checkpoints."""
MANIFEST, RUN_STATE, CONFIG, LEARNER = "manifest.json", "run.json", "config.yaml", "learner"
"""What a checkpoint consists of."""

_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\.[0-9a-f]+\.(partial|removed)")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it, the reason and a remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        format_version: of the folder's layout.
        step: learner steps done.
        policy_version: of the weights.
        num_ranks: that wrote.
        config_sha256: of its ``config.yaml``.
        written_at: UTC, ISO 8601.
        files: size in bytes of every other file, by its path within the checkpoint.
    """

    format_version: int
    step: int
    policy_version: int
    num_ranks: int
    config_sha256: str
    written_at: str
    files: Mapping[str, int]


def begin(root: Path, step: int) -> Path:
    """Make and return the hidden folder into which the checkpoint of ``step`` is written.

    Its name is used once, so that a rank of a dead run that still writes cannot meet a new one.

    Raises:
        OSError: if it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".step-{step:06d}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    return partial


def commit(partial: Path, *, step: int, policy_version: int, num_ranks: int) -> Path:
    """Write the manifest, sync everything and give the checkpoint its name; return its folder.

    Call it when all ranks have written: ``config.yaml`` and ``run.json`` must be there too.

    Raises:
        OSError: if something cannot be written, or there is a checkpoint of this step.
    """
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        step=step,
        policy_version=policy_version,
        num_ranks=num_ranks,
        config_sha256=_sha256(partial / CONFIG),
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files=dict(_sizes(partial)),
    )
    write_synced(partial / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    return _publish(partial, step)


def discard(partial: Path) -> None:
    """Remove a checkpoint that will not be finished, as far as that goes."""
    shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, *, keep: int) -> None:
    """Remove the oldest checkpoints, so that ``keep`` are left."""
    for folder in checkpoints_in(root)[:-keep]:
        hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removed")
        # A folder that a kill leaves half removed must not look like a checkpoint.
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    if root.is_dir():
        for path in root.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:06d}"


def checkpoints_in(root: Path) -> list[Path]:
    """Return all checkpoints of a run, whole or not, the oldest first."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint after checking that all its files are there.

    Raises:
        CheckpointError: if the checkpoint is not whole, or of another format.
    """
    values = _read_json(folder / MANIFEST, folder)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format {version!r}, this version reads {FORMAT_VERSION}; resume it "
            "with the version that wrote it"
        )
    try:
        manifest = Manifest(**values)
        sizes = {str(name): int(size) for name, size in manifest.files.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise _broken(folder, f"its manifest cannot be read ({error})") from None
    for name, size in sizes.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            state = "is absent" if actual is None else f"has {actual} bytes instead of {size}"
            raise _broken(folder, f"{name} {state}")
    if _sha256(folder / CONFIG) != manifest.config_sha256:
        raise _broken(folder, f"{CONFIG} was changed")
    return manifest


def newest_whole(root: Path) -> tuple[tuple[Path, Manifest] | None, tuple[str, ...]]:
    """Return the newest checkpoint that is whole, and why each newer one was passed over."""
    passed_over: list[str] = []
    for folder in reversed(checkpoints_in(root)):
        try:
            return (folder, read_manifest(folder)), tuple(passed_over)
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, tuple(passed_over)


def adopt(checkpoint: Path, root: Path) -> Path:
    """Make a whole checkpoint of another run the first one of this; return its folder.

    Where both are on one file system the files are not copied, they get another name.

    Raises:
        CheckpointError: if it is no longer whole.
        OSError: if it cannot be written.
    """
    manifest = read_manifest(checkpoint)
    partial = begin(root, manifest.step)
    for name in (*manifest.files, MANIFEST):
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, target)
        except OSError:
            shutil.copyfile(checkpoint / name, target)
    return _publish(partial, manifest.step)


def read_run_state(folder: Path) -> Mapping[str, Any]:
    """Return the content of ``run.json``.

    Raises:
        CheckpointError: if it is no JSON object.
    """
    return _read_json(folder / RUN_STATE, folder)


def write_synced(path: Path, text: str) -> None:
    """Write a file and sync it.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a crash of the machine."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _publish(partial: Path, step: int) -> Path:
    """Sync all that is in a hidden folder, then rename it."""
    for path in sorted(partial.rglob("*")):
        _sync(path, os.O_RDONLY)
    sync_folder(partial)
    final = partial.with_name(name_of(step))
    partial.rename(final)
    sync_folder(final.parent)
    return final


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _broken(folder, f"{path.name} cannot be read ({reason})") from None
    if not isinstance(values, dict):
        raise _broken(folder, f"{path.name} is no JSON object")
    return values


def _broken(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: not a whole checkpoint: {reason}; resume from another one, or with "
        "run.resume=auto from the newest that is whole"
    )
