"""Writes a few trajectories now and then, as the learner trains them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from skyrl_async.config import Config
from skyrl_async.learner.learner import Learner
from skyrl_async.learner.minibatches import Minibatch
from skyrl_async.learner.policy import load_tokenizer
from skyrl_async.learner.samples import choose_samples
from skyrl_async.metrics.samples import SampleWriter
from skyrl_async.runtime.settings import policy_source

logger = logging.getLogger(__name__)


class SampleRecorder:
    """An observer of the learner; a failure ends the recording and is logged, the run goes on.

    Args:
        config: of the run.
        learner: that is observed, at the version from which it goes on.
        path: of the file.
    """

    def __init__(self, config: Config, learner: Learner, path: Path) -> None:
        self._learner = learner
        self._every = config.logging.samples_every_steps
        self._count = config.logging.samples_per_step
        self._seed = config.seed
        self._tokenizer = load_tokenizer(policy_source(config))
        self._writer = SampleWriter(path, resume_version=learner.policy_version)

    def __call__(self, minibatches: Sequence[Minibatch]) -> None:
        """Record the step that trains these minibatches, if it is one that is recorded."""
        version = self._learner.policy_version
        if version % self._every:
            return
        try:
            samples = choose_samples(minibatches, count=self._count, seed=self._seed + version)
            self._writer.write(s.record(self._tokenizer, train_version=version) for s in samples)
        except Exception:
            logger.warning("samples are no longer recorded; the run goes on", exc_info=True)
            self._learner.observer = None
