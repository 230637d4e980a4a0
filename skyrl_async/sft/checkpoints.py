"""Checkpoints of a fine-tuning, written by all ranks together while the next step is computed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_async.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    LEARNER,
    RUN_STATE,
    begin,
    commit,
    discard,
    prune,
    write_synced,
)
from skyrl_async.coordination.run_state import RunState
from skyrl_async.learner.learner import Learner
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.training_state import StateWriter, load_training_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Begun:
    partial: Path
    state: RunState
    started_s: float


class SftCheckpoints:
    """Writes the checkpoints of one fine-tuning, on one rank of the learner group.

    ::

        checkpoints.begin(state)     # copies; training may go on
        seconds = checkpoints.end()  # whole now, or OSError; None if none was begun

    All ranks call both at the same points.

    Args:
        run_folder: that all ranks share.
        learner: whose state is written.
        ranks: of its group.
        config: as YAML.
        keep: newest checkpoints that are kept.
        timeout_s: of each exchange between the ranks while they write.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        learner: Learner,
        ranks: RankGroup,
        config: str,
        keep: int,
        timeout_s: float,
    ) -> None:
        self._root = run_folder / CHECKPOINTS
        self._learner = learner
        self._ranks = ranks
        self._config = config
        self._keep = keep
        self._writer = StateWriter(rank=ranks.rank, num_ranks=ranks.num_ranks, timeout_s=timeout_s)
        self._begun: _Begun | None = None

    @property
    def is_writing(self) -> bool:
        """Whether one was begun and not ended."""
        return self._begun is not None

    def begin(self, state: RunState) -> None:
        """Copy the learner's state and begin to write it.

        Raises:
            RuntimeError: if the one before was not ended.
            OSError: if nothing can be written.
        """
        if self._begun is not None:
            raise RuntimeError("a checkpoint is being written; end it before the next is begun")
        started_s = time.monotonic()
        name = begin(self._root, state.step).name if self._ranks.rank == 0 else ""
        partial = self._root / self._shared(name)
        self._begun = _Begun(partial, state, started_s)
        self._writer.start(self._learner.training_state(), partial / LEARNER)

    def end(self) -> float | None:
        """Wait until all ranks have written and make the checkpoint count.

        Returns:
            Seconds from the copy on; None if none was begun.

        Raises:
            OSError: if it could not be written; the checkpoints before it stay.
        """
        if self._begun is None:
            return None
        begun, self._begun = self._begun, None
        try:
            self._writer.finish()
            if self._ranks.rank == 0:
                self._complete(begun)
        except OSError:
            if self._ranks.rank == 0:
                discard(begun.partial)
            raise
        return time.monotonic() - begun.started_s

    def _complete(self, begun: _Begun) -> None:
        state = begun.state
        write_synced(begun.partial / CONFIG, self._config)
        write_synced(begun.partial / RUN_STATE, json.dumps(state.to_json()) + "\n")
        folder = commit(
            begun.partial,
            step=state.step,
            policy_version=state.policy_version,
            num_ranks=self._ranks.num_ranks,
        )
        prune(self._root, keep=self._keep)
        logger.info("checkpoint %s written", folder.name)

    def _shared(self, name: str) -> str:
        """Return rank 0's text on every rank."""
        if self._ranks.num_ranks == 1:
            return name
        import torch.distributed as dist

        box: list[Any] = [name]
        dist.broadcast_object_list(box, src=0)
        return str(box[0])


def restore(learner: Learner, ranks: RankGroup, checkpoint: Path) -> None:
    """Go on from a checkpoint; all ranks call this.

    Raises:
        ValueError: if it is of other weights.
        OSError: if it cannot be read.
    """
    counters = load_training_state(
        learner.training_state(),
        checkpoint / LEARNER,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )
    learner.restore_counters(counters)
