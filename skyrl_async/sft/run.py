"""One fine-tuning: from configuration and demonstrations to the folder that it leaves behind."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from skyrl_async.config import Config
from skyrl_async.run_folder import RunFolder
from skyrl_async.sft.data import DemonstrationSet
from skyrl_async.sft.loop import SftLoop, Stop
from skyrl_async.sft.plan import SftPlan, make_plan
from skyrl_async.sft.processes import other_ranks
from skyrl_async.sft.report import SftReport

logger = logging.getLogger(__name__)

FINISHED, FAILED = 0, 1


def train(config: Config, folder: RunFolder, data: DemonstrationSet) -> int:
    """Train until the end, a failure, or an interrupt; return the exit code.

    A folder that was made to go on with a run does so. ``summary.json`` is written in every case.

    Args:
        config: as it was given.
        folder: of the run.
        data: checked demonstrations.

    Raises:
        ValueError: if the run to go on with trained on other demonstrations; nothing is written.
    """
    plan = make_plan(config, data, folder=folder.path, resume=folder.resume)
    return _Run(plan, data, folder).run()


class _Run:
    """Rank 0 and what outlives its failure: the report and the summary."""

    def __init__(self, plan: SftPlan, data: DemonstrationSet, folder: RunFolder) -> None:
        self._plan = plan
        self._data = data
        self._folder = folder
        self._started_s = time.monotonic()
        self._startup_seconds: float | None = None
        self._stopped_by: signal.Signals | None = None
        self._report = SftReport(
            plan.config,
            data,
            folder=plan.folder,
            steps=plan.steps,
            start=plan.start,
            resumed=plan.resume_from is not None,
        )

    def run(self) -> int:
        error = ""
        try:
            with self._signals():
                stop = self._train()
            status, code = "finished", FINISHED
            if stop is Stop.SIGNAL:
                status, code = self._interrupted()
        except KeyboardInterrupt:
            status, code = self._interrupted()
        except Exception as failure:
            status, code, error = "failed", FAILED, str(failure) or repr(failure)
            logger.error("fine-tuning failed: %s", error)
            logger.info("where it failed", exc_info=failure)
        self._finish(status, error)
        return code

    def _train(self) -> Stop:
        self._report.line(
            f"{len(self._data.training)} demonstrations, {self._plan.steps} steps; "
            "loading torch and the policy"
        )
        with (
            other_ranks(self._plan, self._data) as address,
            SftLoop(
                self._plan,
                self._data,
                store_address=address,
                report=self._report,
                stop=self._stop,
            ) as loop,
        ):
            self._startup_seconds = time.monotonic() - self._started_s
            self._report.begin()
            return loop.run()

    def _stop(self) -> Stop:
        if self._stopped_by is not None:
            return Stop.SIGNAL
        limit_s = self._plan.config.run.max_seconds
        return Stop.TIME if limit_s is not None and self._report.seconds >= limit_s else Stop.NO

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """End after the step at the first signal, at once at the second."""

        def handle(number: int, _: FrameType | None) -> None:
            again, self._stopped_by = self._stopped_by is not None, signal.Signals(number)
            if again:
                raise KeyboardInterrupt

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _interrupted(self) -> tuple[str, int]:
        return "interrupted", 128 + (self._stopped_by or signal.SIGINT)

    def _finish(self, status: str, error: str) -> None:
        resume = self._folder.resume
        summary: dict[str, Any] = {
            "status": status,
            **self._report.summary(),
            "startup_seconds": self._startup_seconds,
            "total_seconds": time.monotonic() - self._started_s,
            "seed": self._plan.config.seed,
            "num_ranks": self._plan.config.learner.num_ranks,
            "resumed_from_step": None if resume is None else resume.manifest.step,
        }
        if error:
            summary["error"] = error
        self._report.close()
        self._folder.write_summary(summary)
        self._report.line(f"{status} after {summary['steps']} steps: {self._folder.path}")
