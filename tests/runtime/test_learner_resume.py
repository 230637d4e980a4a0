"""What a learner worker makes of the rates of a checkpoint."""

from pathlib import Path

import pytest

from skyrl_async.checkpoint import LEARNER
from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.runtime.learner_worker import LearnerWorker
from tests.records import random_batch

RATE = 0.002


def started(config: Config, *, resume_from: Path | None = None) -> LearnerWorker:
    worker = LearnerWorker(config, resume_from=resume_from)
    worker.start()
    return worker


def test_rates_that_the_guard_lowered_come_back_with_the_guard_alone(tmp_path: Path):
    guarded, free = (
        load_config(
            None,
            [
                *("algorithm=ppo", "runtime=local", f"optimizer.learning_rate={RATE}"),
                f"guard.enabled={enabled}",
            ],
        )
        for enabled in ("true", "false")
    )
    worker = started(guarded)
    assert worker.step(random_batch(0, train_version=0)).metrics["policy/lr"] == RATE
    worker.scale_rate(0.25)
    worker.start_checkpoint(tmp_path / LEARNER)
    worker.finish_checkpoint()
    worker.close()
    for config, factor in ((guarded, 0.25), (free, 1.0)):
        again = started(config, resume_from=tmp_path)
        found = again.step(random_batch(1, train_version=1))
        assert found.metrics["policy/lr"] == pytest.approx(factor * RATE)
        counters = again._learner.training_state().counters
        assert counters["critic_rate_factor"] == counters["rate_factor"] == factor
        again.close()
