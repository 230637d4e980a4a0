"""The folder of one run: made before anything starts, held by one process, complete files only."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import math
import numbers
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from skyrl_async.checkpoint import CHECKPOINTS, adopt, checkpoints_in, remove_leftovers
from skyrl_async.config import Config
from skyrl_async.config_loading import dump_config
from skyrl_async.resume import Resume, find_resume

DEFAULT_ROOT = Path("runs")
LOCK_NAME = "run.lock"
logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

SET_ASIDE = "set_aside"
"""Where a run that goes on moves what it does not go on with."""

_RUN_FILES = ("summary.json", "metrics.jsonl", "policy")
_ENDS = ("summary.json", "report.html", "policy", "policy.partial")
_WEIGHTS = "weights"
"""Versions on their way to engines; those of a dead run must not be loaded."""
_MAX_SAME_SECOND = 1000


class RunFolder:
    """What one run leaves behind; made by :meth:`create`, a context manager.

    ::

        with RunFolder.create(config) as folder:  # config.yaml, run.log, run.lock, subfolders
            ...
            folder.write_summary({"status": "finished"})

    Attributes:
        path: absolute path of the folder.
        resume: checkpoint in this folder from which the run goes on, if it does.
    """

    def __init__(
        self,
        path: Path,
        *,
        lock: TextIO,
        log_level: int = logging.INFO,
        resume: Resume | None = None,
    ) -> None:
        self.path = path
        self.resume = resume
        self._lock = lock
        self._log = logging.FileHandler(path / "run.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter(LOG_FORMAT))
        self._log.setLevel(log_level)
        root = logging.getLogger()
        root.addHandler(self._log)
        # A root logger with a handler no longer prints warnings by itself.
        self._stderr = logging.lastResort if root.handlers == [self._log] else None
        if self._stderr is not None:
            root.addHandler(self._stderr)
        self._package_logger = logging.getLogger(__name__.partition(".")[0])
        self._level_before = self._package_logger.level
        self._package_logger.setLevel(log_level)

    @classmethod
    def create(cls, config: Config, *, root: Path = DEFAULT_ROOT) -> Self:
        """Make the folder, take its lock, write ``config.yaml`` and start ``run.log``.

        Args:
            config: ``run.dir`` names the folder; without it ``<root>/<run.name>-<time>`` is made.
                ``run.resume`` says whether a run that is there goes on.
            root: where folders without a name of their own go.

        Raises:
            ValueError: if the folder cannot be made or written, is in use by another process, or
                holds a run already that is not resumed or cannot be.
        """
        named = config.run.dir is not None
        elsewhere = find_resume(config) if config.run.resume != "auto" else None
        try:
            path = _make_named(config) if named else _make_new(root, config)
            lock = _take_lock(path)
        except OSError as error:
            raise ValueError(_explain_unwritable(config, error, root=root)) from error
        try:
            if config.run.resume == "auto":
                resume, aside = _go_on_here(path, config)
            else:
                _refuse_finished(path)
                resume, aside = _go_on_with(elsewhere, path), None
            (path / CHECKPOINTS).mkdir(exist_ok=True)
            if config.logging.tensorboard:
                (path / "tensorboard").mkdir(exist_ok=True)
            write_atomically(path / "config.yaml", dump_config(config))
            folder = cls(path, lock=lock, resume=resume)
            if config.run.resume != "never":
                _log_resume(resume, aside)
            return folder
        except OSError as error:
            lock.close()
            raise ValueError(_explain_unwritable(config, error, root=root)) from error
        except BaseException:
            lock.close()
            raise

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, complete or not at all; NaN and infinities become null.

        Raises:
            TypeError: if a value has no JSON form.
            OSError: if it cannot be written; an earlier summary stays as it was.
        """
        text = json.dumps(_plain(summary), indent=2, allow_nan=False)
        write_atomically(self.path / "summary.json", text + "\n")

    def close(self) -> None:
        """Stop logging and let go of the lock; may be called twice."""
        root = logging.getLogger()
        root.removeHandler(self._log)
        if self._stderr is not None:
            root.removeHandler(self._stderr)
        self._package_logger.setLevel(self._level_before)
        self._log.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_run_folder(config: Config, *, root: Path = DEFAULT_ROOT) -> None:
    """Check what can be checked of a run's folder without making it.

    Raises:
        ValueError: as :meth:`RunFolder.create`.
    """
    path = _named(config) if config.run.dir is not None else root
    try:
        if config.run.dir is not None and (path / LOCK_NAME).exists():
            with open(path / LOCK_NAME, encoding="utf-8") as lock:
                _lock_or_refuse(lock, path)
        if config.run.dir is not None and config.run.resume != "auto":
            _refuse_finished(path)
        find_resume(config)
        existing = path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        # Permission bits say little to root and on read-only file systems; making a folder tells.
        Path(tempfile.mkdtemp(prefix=".writable-", dir=existing)).rmdir()
    except OSError as error:
        raise ValueError(_explain_unwritable(config, error, root=root)) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _named(config: Config) -> Path:
    return Path(str(config.run.dir)).expanduser()


def _make_named(config: Config) -> Path:
    path = _named(config)
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def _make_new(root: Path, config: Config) -> Path:
    """Make ``<root>/<name>-<time>``, with a number where two runs start in the same second."""
    root.mkdir(parents=True, exist_ok=True)
    stem = f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, _MAX_SAME_SECOND + 1):
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path.resolve()
    raise FileExistsError(f"{root / stem} and its {_MAX_SAME_SECOND - 1} successors exist")


def _take_lock(path: Path) -> TextIO:
    """Return the lock file, locked until it is closed, with this process in it."""
    lock = open(path / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        _lock_or_refuse(lock, path)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except BaseException:
        lock.close()
        raise
    return lock


def _lock_or_refuse(lock: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise ValueError(
            f"run.dir={path}: in use by another run (process {holder}); wait for it, stop it, or "
            "give another run.dir"
        ) from None


def _refuse_finished(path: Path) -> None:
    found = [name for name in _RUN_FILES if (path / name).exists()]
    if found:
        raise ValueError(
            f"run.dir={path}: holds a run already ({', '.join(found)}); give run.resume=auto to go "
            "on with it, give another run.dir, or move that folder away"
        )


def _go_on_here(path: Path, config: Config) -> tuple[Resume | None, Path | None]:
    """Make the folder as it was when its newest whole checkpoint was written, or as a new one.

    The metrics are cut when they are opened. All steps can be repeated after a kill.

    Returns:
        Where the run goes on, and where what it does not go on with was moved.
    """
    resume = find_resume(config)
    root = path / CHECKPOINTS
    remove_leftovers(root)
    shutil.rmtree(path / _WEIGHTS, ignore_errors=True)
    moved = [path / name for name in _ENDS]
    if resume is None:
        lines = (path / "metrics.jsonl", path / "samples.jsonl")
        moved += [*checkpoints_in(root), *lines, path / "trace", *_tensorboard_files(path)]
    else:
        newest_first = reversed(checkpoints_in(root))
        moved += itertools.takewhile(lambda other: other != resume.checkpoint, newest_first)
    return resume, _set_aside(path, [one for one in moved if one.exists()])


def _log_resume(resume: Resume | None, aside: Path | None) -> None:
    if resume is None:
        logger.info("no whole checkpoint is here, the run starts anew")
    else:
        for reason in resume.passed_over:
            logger.warning("passed over: %s", reason)
        logger.info("goes on from %s", resume.checkpoint)
        for change in resume.changes:
            logger.info("%s", change)
    if aside is not None:
        logger.info("what the run does not go on with is in %s", aside)


def _tensorboard_files(path: Path) -> list[Path]:
    folder = path / "tensorboard"
    return [folder] if folder.is_dir() and any(folder.iterdir()) else []


def _set_aside(path: Path, moved: list[Path]) -> Path | None:
    """Move files and folders into a new one of their own, if there are any; return that."""
    if not moved:
        return None
    numbers = [int(p.name) for p in (path / SET_ASIDE).glob("[0-9]*") if p.name.isdigit()]
    aside = path / SET_ASIDE / f"{max(numbers, default=0) + 1:03d}"
    for one in moved:
        target = aside / one.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        one.rename(target)
    return aside


def _go_on_with(resume: Resume | None, path: Path) -> Resume | None:
    """Take over the checkpoint and the metrics of another run."""
    if resume is None:
        return None
    checkpoint = adopt(resume.checkpoint, path / CHECKPOINTS)
    before = resume.run_folder
    for name in ("metrics.jsonl", "samples.jsonl"):
        if before is not None and (before / name).exists():
            shutil.copyfile(before / name, path / name)
    return replace(resume, checkpoint=checkpoint)


def _explain_unwritable(config: Config, error: OSError, *, root: Path) -> str:
    where = f"run.dir={config.run.dir}" if config.run.dir is not None else f"folder {root}"
    remedy = "give a run.dir in a folder that you can write to"
    return f"{where}: cannot be written ({error.strerror or error}: {error.filename}); {remedy}"


def _plain(value: Any) -> Any:
    """Return ``value`` with the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")
