"""Writes the checkpoints of a run: the learner's shards, the coordinator's state, the manifest."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skyrl_async.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    LEARNER,
    RUN_STATE,
    begin,
    checkpoints_in,
    commit,
    discard,
    prune,
    write_synced,
)
from skyrl_async.coordination.errors import WorkerFailed
from skyrl_async.coordination.run_state import RunState

logger = logging.getLogger(__name__)


class StatefulLearner(Protocol):
    """A learner group that can write its state."""

    async def start_checkpoint(self, folder: Path) -> None:
        """Copy the training state on all ranks, and begin to write it into a folder."""
        ...

    async def finish_checkpoint(self) -> None:
        """Return when all ranks have written and synced; steps may go on meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class _Begun:
    partial: Path
    state: RunState
    started_s: float


class CheckpointWriter:
    """Writes checkpoints of one run; see :class:`skyrl_async.coordination.checkpointing`.

    Whatever goes wrong, the checkpoints that are there stay. The hidden folder of one that cannot
    be written is removed.

    Args:
        run_folder: of the run.
        learner: all ranks.
        num_ranks: of the learner group.
        config: as YAML.
        keep: newest checkpoints that are kept.
        on_written: told the seconds from the copy until the checkpoint was whole.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        learner: StatefulLearner,
        num_ranks: int,
        config: str,
        keep: int,
        on_written: Callable[[float], None],
    ) -> None:
        self._run_folder = run_folder
        self._root = run_folder / CHECKPOINTS
        self._learner = learner
        self._num_ranks = num_ranks
        self._config = config
        self._keep = keep
        self._on_written = on_written
        self._begun: _Begun | None = None

    async def begin(self, state: RunState) -> None:
        """Copy the learner's state and begin to write it.

        Raises:
            OSError: if nothing can be written.
            WorkerFailed: if the learner fails in another way.
        """
        started_s = time.monotonic()
        try:
            partial = begin(self._root, state.step)
        except OSError as error:
            raise self._failure(state.step, error) from error
        self._begun = _Begun(partial, state, started_s)
        try:
            await _of_the_learner(self._learner.start_checkpoint(partial / LEARNER))
        except OSError as error:
            raise await self._give_up(error) from error

    async def finish(self) -> None:
        """Wait for all ranks, and make the checkpoint one that counts.

        Raises:
            RuntimeError: if none was begun.
            OSError: if it could not be written.
            WorkerFailed: if the learner fails in another way.
        """
        if self._begun is None:
            raise RuntimeError("no checkpoint was begun")
        begun = self._begun
        try:
            await _of_the_learner(self._learner.finish_checkpoint())
            folder = await asyncio.to_thread(self._complete, begun)
        except OSError as error:
            raise await self._give_up(error) from error
        seconds = time.monotonic() - begun.started_s
        self._begun = None
        self._on_written(seconds)
        logger.info("checkpoint %s written in %.2f s", folder.name, seconds)

    def _complete(self, begun: _Begun) -> Path:
        state = begun.state
        write_synced(begun.partial / CONFIG, self._config)
        write_synced(begun.partial / RUN_STATE, json.dumps(state.to_json()) + "\n")
        # Its rows up to this step must last as long as the checkpoint does.
        _sync_if_there(self._run_folder / "metrics.jsonl")
        folder = commit(
            begun.partial,
            step=state.step,
            policy_version=state.policy_version,
            num_ranks=self._num_ranks,
        )
        prune(self._root, keep=self._keep)
        return folder

    async def _give_up(self, cause: OSError) -> OSError:
        begun, self._begun = self._begun, None
        assert begun is not None
        await asyncio.to_thread(discard, begun.partial)
        return self._failure(begun.state.step, cause)

    def _failure(self, step: int, cause: OSError) -> OSError:
        whole = checkpoints_in(self._root)
        newest = whole[-1].name if whole else "none"
        return OSError(
            f"step {step} could not be written to {self._root} ({cause}); the newest checkpoint "
            f"there is {newest}; make room, and go on with run.resume=auto"
        )


async def _of_the_learner(call: Awaitable[None]) -> None:
    """Await a call; what is no trouble with writing is the learner's own."""
    try:
        await call
    except OSError:
        raise
    except Exception as error:
        raise WorkerFailed(f"learner: {error}") from error


def _sync_if_there(path: Path) -> None:
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
