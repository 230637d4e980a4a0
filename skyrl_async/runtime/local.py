"""The run in one process: actors on this asyncio loop, the learner in a thread. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skyrl_async.config import Config
from skyrl_async.runtime.learner_worker import LearnerWorker
from skyrl_async.runtime.rollout_worker import RolloutWorker, engine_name
from skyrl_async.types import SampledBatch, StepResult


class LocalLearner:
    """The learner's methods as coroutines; they run one after the other in one thread."""

    def __init__(self, worker: LearnerWorker) -> None:
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the learner's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def step(self, batch: SampledBatch) -> StepResult:
        """Train on a batch."""
        return await self.call(self._worker.step, batch)

    async def save_policy(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        await self.call(self._worker.save_policy, folder)

    async def close(self) -> None:
        """Wait for the running step, stop publishing and end the thread."""
        await self.call(self._worker.close)
        self._thread.shutdown(wait=False)


class LocalRuntime:
    """Builds all workers in this process; see :class:`skyrl_async.run.Runtime`.

    Args:
        config: of the run, with one learner rank.
        folder: of the run.
    """

    def __init__(self, config: Config, *, folder: Path) -> None:
        worker = LearnerWorker(config)
        self.learner = LocalLearner(worker)
        self.rollouts: Mapping[str, RolloutWorker] = {
            engine_name(i): RolloutWorker(config, index=i) for i in range(config.rollout.num_actors)
        }
        self._learner_worker = worker
        self._folder = folder

    async def start(self, status: Callable[[str], None]) -> Mapping[str, Any]:
        """Load everything and connect the engines; return where each worker runs."""
        status("loading torch and the policy")
        where = {"learner 0": await self.learner.call(self._learner_worker.start)}
        for name, worker in self.rollouts.items():
            where[name] = await worker.start()
        addresses = await self.learner.call(self._open_publisher)
        for name, worker in self.rollouts.items():
            await worker.connect(addresses[name])
        return where

    async def close(self) -> None:
        """Stop all workers."""
        await asyncio.gather(*(worker.close() for worker in self.rollouts.values()))
        await self.learner.close()

    def _open_publisher(self) -> Any:
        return self._learner_worker.open_publisher(
            list(self.rollouts), host="127.0.0.1", folder=self._folder / "weights"
        )
