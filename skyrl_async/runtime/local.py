"""The run in one process: actors on this asyncio loop, the learner in a thread. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from skyrl_async.config import Config
from skyrl_async.resume import Resume, start_version
from skyrl_async.runtime.engine_worker import EngineWorker, server_names
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

    async def open_pair(self, engine_id: str) -> Any:
        """Make a new sender for an engine; return its address."""
        return await self.call(self._worker.open_pair, engine_id)

    async def close_pair(self, engine_id: str) -> None:
        """Give up the sender of an engine at once: the publisher is safe to call meanwhile."""
        self._worker.close_pair(engine_id)

    async def publish_newest(self) -> None:
        """Publish the present weights to the engines that do not have them."""
        await self.call(self._worker.publish_newest)

    async def remember(self) -> None:
        """Keep a copy of weights and optimizer."""
        await self.call(self._worker.remember)

    async def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and publish it."""
        return await self.call(self._worker.roll_back)

    async def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps."""
        await self.call(self._worker.scale_rate, factor)

    async def start_checkpoint(self, folder: Path) -> None:
        """Copy the training state, and begin to write it."""
        await self.call(self._worker.start_checkpoint, folder)

    async def finish_checkpoint(self) -> None:
        """Return when it is written; steps may go on meanwhile."""
        await asyncio.to_thread(self._worker.finish_checkpoint)

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
        resume: where the run goes on, if it does not begin.
    """

    def __init__(self, config: Config, *, folder: Path, resume: Resume | None = None) -> None:
        checkpoint = resume.checkpoint if resume else None
        worker = LearnerWorker(config, resume_from=checkpoint, folder=folder)
        version = start_version(resume)
        self.learner = LocalLearner(worker)
        self.rollouts: Mapping[str, RolloutWorker] = {
            engine_name(i): RolloutWorker(config, index=i, start_version=version, folder=folder)
            for i in range(config.rollout.num_actors)
        }
        self.engines: Mapping[str, EngineWorker] = {
            name: EngineWorker(config, index=i, folder=folder)
            for i, name in enumerate(server_names(config))
        }
        self._learner_worker = worker
        self._resume = resume
        self._folder = folder

    async def start(self, status: Callable[[str], None]) -> Mapping[str, Any]:
        """Load everything and connect the engines; return where each worker runs."""
        status("loading torch and the policy")
        where = {"learner 0": await self.learner.call(self._learner_worker.start)}
        for name, worker in self.rollouts.items():
            where[name] = await worker.start()
        open_publisher = partial(
            self._learner_worker.open_publisher, host="127.0.0.1", folder=self._folder / "weights"
        )
        await self.learner.call(open_publisher)
        samples = self._folder / "samples.jsonl"
        await self.learner.call(self._learner_worker.record_samples, samples)
        if self.engines:
            status("starting SGLang")
            places = await asyncio.gather(*(engine.start() for engine in self.engines.values()))
            return {**where, **dict(zip(self.engines, places, strict=True))}
        for name, worker in self.rollouts.items():
            await worker.connect(await self.learner.open_pair(name))
        if self._resume is not None:
            # Engines have the initial weights; the coordinator lets none play before these.
            await self.learner.publish_newest()
        return where

    async def close(self) -> None:
        """Stop all workers."""
        await asyncio.gather(
            *(worker.close() for worker in self.rollouts.values()),
            *(engine.close() for engine in self.engines.values()),
        )
        await self.learner.close()
