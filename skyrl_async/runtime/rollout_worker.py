"""A rollout actor and all that it needs in its process: engine, environments, receiver."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.metrics.trace import NULL_TRACER, Tracing, open_tracer
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.runtime.actor_engines import EmbeddedEngines, ServerEngines
from skyrl_async.types import Assignment, EvaluationResult, RolloutReport, Task

if TYPE_CHECKING:
    from skyrl_async.rollout.actor import Engine
    from skyrl_async.rollout.episode import Sessions
    from skyrl_async.runtime.simulated import SimulatedEngines
    from skyrl_async.weight_sync.receiving import Address


class RolloutWorker:
    """Builds a rollout actor from the configuration and runs it on the loop that calls it.

    ::

        worker = RolloutWorker(config, index=0)
        await worker.start()                       # loads the policy
        await worker.connect(address)              # to the learner's publisher, or
        await worker.set_engines(endpoints)        # where engines are workers of their own
        await worker.submit(assignments)
        report = await worker.poll(wait_s=1.0)
        await worker.close()

    Args:
        config: of the run.
        index: of this actor, from 0.
        start_version: policy version from which the run goes on; its random numbers are others.
        folder: of the run, for the timeline; None leaves none.
    """

    def __init__(
        self,
        config: Config,
        *,
        index: int,
        start_version: int = 0,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder if config.logging.trace else None
        self._tracer: Tracing = NULL_TRACER
        self._start_version = start_version
        self._config = config
        self._index = index
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> Mapping[str, Any]:
        """Load the policy and start the engine; return where this worker runs."""
        from skyrl_async.environments.host import EnvironmentHost
        from skyrl_async.learner.policy import load_tokenizer, vocabulary_size
        from skyrl_async.rollout.actor import RolloutActor, RolloutSettings
        from skyrl_async.rollout.chat import Chat
        from skyrl_async.rollout.episode import EpisodeLimits
        from skyrl_async.runtime.settings import policy_source, sampling_settings

        config = self._config
        self._tracer = open_tracer(self._folder, process=engine_name(self._index))
        source = policy_source(config)
        self._engines: EmbeddedEngines | ServerEngines | SimulatedEngines
        if config.simulate.engine:
            from skyrl_async.runtime.simulated import SimulatedEngines

            self._engines = SimulatedEngines(
                config, index=self._index, start_version=self._start_version, tracer=self._tracer
            )
        elif config.engine.kind == "embedded":
            self._engines = EmbeddedEngines(
                config, index=self._index, start_version=self._start_version, tracer=self._tracer
            )
        else:
            self._engines = ServerEngines(
                config, vocab_size=vocabulary_size(source), tracer=self._tracer
            )
        chat = Chat(load_tokenizer(source))
        env = config.environment
        self._host = EnvironmentHost(
            env.name,
            env.options,
            in_process=env.in_process,
            num_processes=env.num_processes,
            step_timeout_s=env.step_timeout_s,
            max_observation_chars=env.max_observation_chars,
        )
        self._actor = RolloutActor(
            engine=self._perturbed(self._engines.engine),
            evaluation_engine=self._engines.for_evaluation,
            sessions=self._slowed(self._host),
            chat=chat,
            settings=RolloutSettings(
                group_size=config.rollout.group_size,
                sampling=sampling_settings(config, stop_token_ids=chat.stop_token_ids),
                limits=EpisodeLimits(
                    max_turns=env.max_turns,
                    context_length=config.engine.context_length,
                    timeout_s=env.episode_timeout_s,
                ),
                num_drawn_slots=config.logging.trace_slots,
            ),
            tracer=self._tracer,
        )
        self._running = asyncio.create_task(self._actor.run())
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def _perturbed(self, engine: Engine) -> Engine:
        """Return the engine as the lab wants it."""
        from skyrl_async.lab.noisy_engine import NoisyEngine

        std = self._config.lab.logprob_noise
        return NoisyEngine(engine, std=std, seed=self._config.seed) if std else engine

    def _slowed(self, sessions: Sessions) -> Sessions:
        """Return the environments as the lab wants them."""
        from skyrl_async.lab.stragglers import StragglingSessions

        lab = self._config.lab
        if not lab.straggler_fraction:
            return sessions
        return StragglingSessions(
            sessions,
            fraction=lab.straggler_fraction,
            factor=lab.straggler_factor,
            seed=self._config.seed + self._index,
        )

    async def connect(self, address: Address) -> None:
        """Start the weight receiver beside the engine of this process.

        Args:
            address: of this engine's sender: a pair of a collective transport, or a folder.
        """
        self._engines.connect(address, self._actor.engine_swapped)

    async def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Play with these servers from now on."""
        self._engines.set_engines(endpoints)

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start to play; returns at once."""
        self._actor.submit(assignments)

    async def poll(self, *, wait_s: float) -> RolloutReport:
        """Return what happened since the last report.

        Raises:
            RuntimeError: if the engine, a group, or the weight receiver failed.
        """
        self._engines.check()
        return await self._actor.poll(wait_s=wait_s)

    async def evaluate(
        self, tasks: Sequence[Task], *, endpoint: EngineEndpoint | None = None
    ) -> EvaluationResult:
        """Play ``tasks`` greedily with the weights that the engine, or the server, has now."""
        return await self._actor.evaluate(tasks, endpoint=endpoint)

    async def close(self) -> None:
        """Stop everything that this worker started."""
        if self._running is not None:
            await self._engines.close()
            await self._actor.close()
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            await self._host.close()
        self._tracer.close()


def engine_name(index: int) -> str:
    """Return the name of rollout actor ``index`` and of its engine."""
    return f"rollout actor {index}"
