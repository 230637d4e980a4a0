"""One run: from configuration to components, through training, to what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from skyrl_async.config import Config
from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.coordinator import (
    Coordinator,
    CoordinatorSettings,
)
from skyrl_async.coordination.engine_fleet import EngineWorker
from skyrl_async.coordination.filters import FilterSettings
from skyrl_async.coordination.guard import CollapseGuard, GuardSettings
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.coordination.workers import LearnerGroup, RolloutWorker
from skyrl_async.environments.tasks import TaskSource, heldout_tasks
from skyrl_async.metrics.console import ConsoleSink
from skyrl_async.metrics.recorder import Recorder, Sink
from skyrl_async.metrics.sinks import JsonlSink, TensorBoardSink
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.replay.selectors import fifo, uniform
from skyrl_async.run_folder import RunFolder
from skyrl_async.types import EvaluationResult

logger = logging.getLogger(__name__)

FINISHED, FAILED, INTERRUPTED = 0, 1, 130
CLOSE_TIMEOUT_S = 4.0


class SavingLearner(LearnerGroup, Protocol):
    """A learner group that can also write the policy."""

    async def save_policy(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        ...


class Runtime(Protocol):
    """Where the workers run: ``start``, use ``rollouts`` and ``learner``, ``close``."""

    @property
    def rollouts(self) -> Mapping[str, RolloutWorker]:
        """Rollout actors by name."""
        ...

    @property
    def engines(self) -> Mapping[str, EngineWorker]:
        """Workers beside engines by name; empty if rollout actors have engines of their own."""
        ...

    @property
    def learner(self) -> SavingLearner:
        """All learner ranks."""
        ...

    async def start(self, status: Callable[[str], None]) -> Mapping[str, Any]:
        """Start all workers and return where each runs; say what goes on."""
        ...

    async def close(self) -> None:
        """Stop all workers."""
        ...


def train(config: Config, folder: RunFolder) -> int:
    """Run until the end, a failure, or an interrupt; return the exit code.

    ``summary.json`` is written in every case.
    """
    console = ConsoleSink(
        config.logging.console,
        run_name=config.run.name,
        steps=config.run.steps,
        staleness_max=config.staleness.max,
        max_seconds=config.run.max_seconds,
        run_dir=folder.path if config.logging.tensorboard else None,
    )
    return asyncio.run(_Run(config, folder, console).run())


async def evaluate(config: Config) -> EvaluationResult:
    """Play the held-out tasks greedily with the policy of ``model.path``, in this process.

    Raises:
        ValueError: if the policy cannot be loaded.
    """
    from skyrl_async.runtime.rollout_worker import RolloutWorker as LocalWorker

    worker = LocalWorker(config, index=0)
    try:
        await worker.start()
        tasks = heldout_tasks(config.environment.name, config.evaluation.num_tasks)
        async with asyncio.timeout(config.evaluation.timeout_s):
            return await worker.evaluate(tasks)
    finally:
        await worker.close()


class _Run:
    """Holds what outlives a failure: the metrics, the summary and the workers' places."""

    def __init__(self, config: Config, folder: RunFolder, console: ConsoleSink) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._started_s = time.monotonic()
        self._startup_seconds: float | None = None
        self._metrics: RunMetrics | None = None
        self._recorder: Recorder | None = None
        self._workers: Mapping[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopped_by = signal.SIGINT

    async def run(self) -> int:
        self._task = asyncio.create_task(self._body())
        self._listen_to_signals()
        error = ""
        try:
            await self._task
            status, code = "finished", FINISHED
        except asyncio.CancelledError:
            status = "interrupted"
            code = 128 + self._stopped_by
        except Exception as failure:
            status, code, error = "failed", FAILED, str(failure) or repr(failure)
            logger.error("run failed: %s", error)
            logger.info("where it failed", exc_info=failure)
        self._finish(status, error)
        return code

    async def _body(self) -> None:
        runtime = _make_runtime(self._config, folder=self._folder.path)
        try:
            self._workers = await runtime.start(self._console.status)
            # Ray takes the signals for itself when it starts.
            self._listen_to_signals()
            self._startup_seconds = time.monotonic() - self._started_s
            self._console.status("playing the first episodes")
            await self._train(runtime)
            await runtime.learner.save_policy(self._folder.path / "policy")
        finally:
            closing = asyncio.ensure_future(runtime.close())
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(closing), CLOSE_TIMEOUT_S)

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)

    def _stop(self, number: signal.Signals) -> None:
        self._stopped_by = number
        if self._task is not None:
            self._task.cancel()

    async def _train(self, runtime: Runtime) -> None:
        config = self._config
        sinks: list[Sink] = [self._console, JsonlSink(self._folder.path / "metrics.jsonl")]
        if config.logging.tensorboard:
            sinks.append(TensorBoardSink(self._folder.path / "tensorboard"))
        self._recorder = Recorder(sinks, clock=time.monotonic)
        self._metrics = RunMetrics(self._recorder, clock=time.monotonic)
        coordinator = Coordinator(
            tasks=TaskSource(config.environment.name, seed=config.seed),
            groups=_make_ledger(config),
            rollouts=runtime.rollouts,
            learner=runtime.learner,
            metrics=self._metrics,
            settings=_coordinator_settings(config),
            clock=time.monotonic,
            engines=runtime.engines,
            filters=FilterSettings(**config.filters.model_dump()),
            guard=_make_guard(config),
        )
        await coordinator.run()

    def _finish(self, status: str, error: str) -> None:
        summary: dict[str, Any] = {
            "status": status,
            "steps": 0,
            "seconds": 0.0,
            "startup_seconds": self._startup_seconds,
            "reward_final": None,
            "eval_reward_final": None,
            "trajectories_trained": 0,
            "tokens_generated": 0,
            "staleness_observed_max": 0,
            "dropped": {},
        }
        if self._metrics is not None:
            summary.update(self._metrics.summary())
        summary["total_seconds"] = time.monotonic() - self._started_s
        summary["staleness_configured_max"] = self._config.staleness.max
        summary["seed"] = self._config.seed
        summary["runtime"] = self._config.runtime
        summary["workers"] = dict(self._workers)
        if error:
            summary["error"] = error
        if self._recorder is not None:
            self._recorder.close()
        self._folder.write_summary(summary)
        self._console.finish(summary, run_dir=self._folder.path)


def _make_runtime(config: Config, *, folder: Path) -> Runtime:
    if config.runtime == "local":
        from skyrl_async.runtime.local import LocalRuntime

        return LocalRuntime(config, folder=folder)
    from skyrl_async.runtime.ray_runtime import RayRuntime

    return RayRuntime(config, folder=folder)


def _make_ledger(config: Config) -> GroupLedger:
    batch, bound, replay = config.learner.groups_per_step, config.staleness, config.replay
    rule = StalenessRule(name=bound.rule, max_staleness=bound.max, groups_per_step=batch)
    return GroupLedger(
        rule=rule,
        admission=Admission(
            groups_per_step=batch,
            max_staleness=bound.max,
            largest_group_bytes=config.largest_group_bytes,
            capacity_bytes=replay.capacity_bytes,
            capacity_groups=replay.capacity_groups,
            max_times_sampled=replay.max_times_sampled,
        ),
        buffer=ReplayBuffer(
            groups_per_step=batch,
            rule=rule,
            selector=fifo if replay.selector == "fifo" else uniform(config.seed),
            max_times_sampled=replay.max_times_sampled,
        ),
    )


def _make_guard(config: Config) -> CollapseGuard | None:
    values = config.guard.model_dump()
    return CollapseGuard(GuardSettings(**values)) if values.pop("enabled") else None


def _coordinator_settings(config: Config) -> CoordinatorSettings:
    evaluation, environment = config.evaluation, config.environment
    return CoordinatorSettings(
        steps=config.run.steps,
        max_seconds=config.run.max_seconds,
        stop_at_eval_reward=config.run.stop_at_eval_reward,
        evaluation_every_steps=evaluation.every_steps,
        evaluation_tasks=heldout_tasks(environment.name, evaluation.num_tasks),
        max_groups_per_actor=config.rollout.max_groups_per_actor,
        step_timeout_s=config.learner.step_timeout_s,
        stall_timeout_s=2 * environment.episode_timeout_s + config.weight_sync.timeout_s,
        evaluation_timeout_s=evaluation.timeout_s,
    )
