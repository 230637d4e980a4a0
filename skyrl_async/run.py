"""One run: from configuration to components, through training, to what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_async.checkpoint import read_run_state
from skyrl_async.checkpoint_writer import CheckpointWriter, StatefulLearner
from skyrl_async.config import Config
from skyrl_async.config_loading import dump_config
from skyrl_async.coordination.coordinator import Coordinator
from skyrl_async.coordination.engine_fleet import EngineWorker
from skyrl_async.coordination.filters import FilterSettings
from skyrl_async.coordination.run_metrics import RunMetrics
from skyrl_async.coordination.run_state import RunState
from skyrl_async.coordination.workers import LearnerGroup, RolloutWorker
from skyrl_async.environments.tasks import TaskSource, heldout_tasks
from skyrl_async.metrics.console import ConsoleSink
from skyrl_async.metrics.recorder import Recorder, Sink
from skyrl_async.metrics.sinks import JsonlSink, TensorBoardSink
from skyrl_async.metrics.trace import Tracing, open_tracer
from skyrl_async.metrics.trackers import Status, TrackerSink, end_trackers, start_trackers
from skyrl_async.metrics.waste import largest_waste
from skyrl_async.report.writing import write_report_in_time
from skyrl_async.resume import Resume
from skyrl_async.run_folder import RunFolder
from skyrl_async.runtime.coordinator_build import (
    coordinator_settings,
    make_guard,
    make_ledger,
    waste_facts,
)
from skyrl_async.runtime.heap import frozen_heap
from skyrl_async.types import EvaluationResult

if TYPE_CHECKING:
    from skyrl_async.report.server import ReportServer

logger = logging.getLogger(__name__)

FINISHED, FAILED, INTERRUPTED = 0, 1, 130
CLOSE_TIMEOUT_S = 4.0
REPORT_TIMEOUT_S = 20.0


class SavingLearner(LearnerGroup, StatefulLearner, Protocol):
    """A learner group that can also write its state and the policy."""

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

    A folder that was made to go on with a run does so. ``summary.json`` is written in every case.
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
        self._trackers: tuple[TrackerSink, ...] = ()
        self._workers: Mapping[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._coordinator: Coordinator | None = None
        self._stopped_by: signal.Signals | None = None
        self._stopped_s: float | None = None
        self._dashboard: ReportServer | None = None

    async def run(self) -> int:
        self._task = asyncio.create_task(self._body())
        self._listen_to_signals()
        if self._config.run.dashboard:
            self._dashboard = self._open_dashboard()
        error = ""
        status: Status
        try:
            await self._task
            status, code = "finished", FINISHED
        except asyncio.CancelledError:
            status = "interrupted"
            code = 128 + (self._stopped_by or signal.SIGINT)
        except Exception as failure:
            status, code, error = "failed", FAILED, str(failure) or repr(failure)
            logger.error("run failed: %s", error)
            logger.info("where it failed", exc_info=failure)
        self._finish(status, error)
        return code

    async def _body(self) -> None:
        runtime = _make_runtime(self._config, self._folder)
        try:
            self._workers = await runtime.start(self._console.status)
            # Ray takes the signals for itself when it starts.
            self._listen_to_signals()
            self._startup_seconds = time.monotonic() - self._started_s
            self._console.status("playing the first episodes")
            with frozen_heap():
                await self._train(runtime)
            if self._stopped_by is not None:
                raise asyncio.CancelledError
            await runtime.learner.save_policy(self._folder.path / "policy")
        finally:
            closing = asyncio.ensure_future(runtime.close())
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(closing), self._close_timeout_s())

    def _close_timeout_s(self) -> float:
        """Return how long closing may take: less if an interrupt has waited for a checkpoint."""
        waited_s = 0.0 if self._stopped_s is None else time.monotonic() - self._stopped_s
        return max(1.0, CLOSE_TIMEOUT_S - waited_s)

    def _open_dashboard(self) -> ReportServer | None:
        from skyrl_async.report.server import open_server

        run, announce = self._config.run, self._console.announce
        host, port = run.dashboard_host, run.dashboard_port
        return open_server(self._folder.path, host=host, port=port, announce=announce)

    def _report_timeout_s(self) -> float:
        """Return how long the report may take: less if the run was interrupted."""
        if self._stopped_s is None:
            return REPORT_TIMEOUT_S
        return max(0.5, CLOSE_TIMEOUT_S - (time.monotonic() - self._stopped_s))

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)

    def _stop(self, number: signal.Signals) -> None:
        """End after the step with a checkpoint, if that is soon; at a second signal at once."""
        again, self._stopped_by = self._stopped_by is not None, number
        self._stopped_s = self._stopped_s or time.monotonic()
        if self._task is None:
            return
        wait_s = self._config.checkpoint.interrupt_timeout_s
        if again or not wait_s or self._coordinator is None or not self._coordinator.has_store:
            self._task.cancel()
            return
        self._coordinator.stop()
        asyncio.get_running_loop().call_later(wait_s, self._cancel_training)

    def _cancel_training(self) -> None:
        if self._coordinator is not None and self._task is not None:
            self._task.cancel()

    async def _train(self, runtime: Runtime) -> None:
        folder = self._folder.path if self._config.logging.trace else None
        tracer = open_tracer(folder, process="coordinator")
        self._coordinator = self._make_coordinator(runtime, tracer)
        try:
            await self._coordinator.run()
        finally:
            self._coordinator = None
            tracer.close()

    def _make_coordinator(self, runtime: Runtime, tracer: Tracing) -> Coordinator:
        config, start = self._config, _start_of(self._folder)
        self._metrics = self._open_metrics(start)
        tasks = TaskSource(config.environment.name, seed=config.seed)
        if start.tasks:
            tasks.restore(start.tasks)
        return Coordinator(
            tasks=tasks,
            groups=make_ledger(config, start),
            rollouts=runtime.rollouts,
            learner=runtime.learner,
            metrics=self._metrics,
            settings=coordinator_settings(config),
            clock=time.monotonic,
            engines=runtime.engines,
            filters=FilterSettings(**config.filters.model_dump()),
            guard=make_guard(config, start),
            checkpoints=_make_writer(config, self._folder, runtime.learner, self._metrics),
            tracer=tracer,
            start=start,
        )

    def _open_metrics(self, start: RunState) -> RunMetrics:
        path = self._folder.path
        resume_step = start.step if self._folder.resume is not None else None
        sinks: list[Sink] = [
            self._console,
            JsonlSink(path / "metrics.jsonl", resume_step=resume_step),
        ]
        if self._config.logging.tensorboard:
            sinks.append(TensorBoardSink(path / "tensorboard", resume_step=resume_step))
        logs = self._config.logging
        self._trackers = start_trackers(
            logs.trackers, project=logs.project, folder=path, config=self._config.model_dump()
        )
        sinks += self._trackers
        self._recorder = Recorder(
            sinks, clock=time.monotonic, seconds_before=float(start.metrics.get("seconds", 0.0))
        )
        return RunMetrics(self._recorder, clock=time.monotonic, state=start.metrics)

    def _totals(self) -> Mapping[str, Any]:
        """Return what the run has done so far, in earlier processes at least."""
        if self._metrics is not None:
            return self._metrics.summary()
        if self._folder.resume is None:
            return {}
        metrics = _start_of(self._folder).metrics
        return RunMetrics(Recorder([]), clock=time.monotonic, state=metrics).summary()

    def _finish(self, status: Status, error: str) -> None:
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
        summary.update(self._totals())
        summary["total_seconds"] = time.monotonic() - self._started_s
        summary["staleness_configured_max"] = self._config.staleness.max
        summary["seed"] = self._config.seed
        waste = largest_waste(summary.get("idle", {}), waste_facts(self._config, summary))
        summary["largest_waste"] = None if waste is None else waste.to_json()
        lag = self._config.lab.exact_lag
        if lag is not None:
            # So many steps trained tokens of the initial weights, for want of older ones.
            summary["lab"] = {"exact_lag": lag, "warmup_steps": min(lag, summary["steps"])}
        if simulated := self._config.simulate.parts:
            summary["simulated"] = list(simulated)
        summary["runtime"] = self._config.runtime
        resume = self._folder.resume
        summary["resumed_from_step"] = None if resume is None else resume.manifest.step
        summary["workers"] = dict(self._workers)
        if error:
            summary["error"] = error
        summary["trackers_lost_steps"] = self._end_trackers(status)
        self._folder.write_summary(summary)
        if self._config.logging.report:
            write_report_in_time(self._folder.path, timeout_s=self._report_timeout_s())
        if self._dashboard is not None:
            self._dashboard.close()
        self._console.finish(summary, run_dir=self._folder.path)
        # Last, since this turns the console off.
        if self._recorder is not None:
            self._recorder.close()

    def _end_trackers(self, status: Status) -> Mapping[str, int]:
        """Let all trackers take what is left; return how many steps each one did not take."""
        timeout_s = self._config.logging.tracker_timeout_s
        if status == "interrupted":
            timeout_s = min(timeout_s, self._close_timeout_s())
        return end_trackers(self._trackers, status=status, timeout_s=timeout_s)


def _make_runtime(config: Config, folder: RunFolder) -> Runtime:
    if config.runtime == "local":
        from skyrl_async.runtime.local import LocalRuntime

        return LocalRuntime(config, folder=folder.path, resume=folder.resume)
    from skyrl_async.runtime.ray_runtime import RayRuntime

    return RayRuntime(config, folder=folder.path, resume=folder.resume)


def _start_of(folder: RunFolder) -> RunState:
    """Return where the run goes on, or its beginning."""
    resume: Resume | None = folder.resume
    return RunState() if resume is None else RunState.from_json(read_run_state(resume.checkpoint))


def _make_writer(
    config: Config, folder: RunFolder, learner: SavingLearner, metrics: RunMetrics
) -> CheckpointWriter | None:
    if not config.checkpoint.every_steps:
        return None
    return CheckpointWriter(
        folder.path,
        learner=learner,
        num_ranks=config.learner.num_ranks,
        config=dump_config(config),
        keep=config.checkpoint.keep,
        on_written=metrics.checkpoint_written,
    )
