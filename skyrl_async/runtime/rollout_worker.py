"""A rollout actor and all that it needs in its process: engine, environments, receiver."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.types import Assignment, EvaluationResult, RolloutReport, Task

if TYPE_CHECKING:
    from skyrl_async.rollout.embedded_engine import EmbeddedEngine
    from skyrl_async.weight_sync.collective import PairAddress
    from skyrl_async.weight_sync.layout import WeightLayout
    from skyrl_async.weight_sync.transport import WeightReceiverTransport

_EVALUATION_SEED = 1


class RolloutWorker:
    """Builds a rollout actor from the configuration and runs it on the loop that calls it.

    ::

        worker = RolloutWorker(config, index=0)
        await worker.start()                       # loads the policy
        await worker.connect(address)              # to the learner's publisher
        await worker.submit(assignments)
        report = await worker.poll(wait_s=1.0)
        await worker.close()

    Args:
        config: of the run.
        index: of this actor, from 0.
    """

    def __init__(self, config: Config, *, index: int) -> None:
        self._config = config
        self._index = index
        self._running: asyncio.Task[None] | None = None
        self._receiver: Any = None

    async def start(self) -> Mapping[str, Any]:
        """Load the policy and start the engine; return where this worker runs."""
        import torch

        from skyrl_async.environments.host import EnvironmentHost
        from skyrl_async.learner.policy import load_model, load_tokenizer
        from skyrl_async.rollout.actor import RolloutActor, RolloutSettings
        from skyrl_async.rollout.chat import Chat
        from skyrl_async.rollout.episode import EpisodeLimits
        from skyrl_async.runtime.settings import policy_source, sampling_settings

        config = self._config
        torch.set_num_threads(config.engine.num_threads)
        source = policy_source(config)
        self._model = load_model(source).requires_grad_(False)
        self._engine = self._make_engine(self._model, seed=config.seed + self._index)
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
            engine=self._engine,
            evaluation_engine=self._make_evaluation_engine,
            sessions=self._host,
            chat=chat,
            settings=RolloutSettings(
                group_size=config.rollout.group_size,
                sampling=sampling_settings(config, stop_token_ids=chat.stop_token_ids),
                limits=EpisodeLimits(
                    max_turns=env.max_turns,
                    context_length=config.engine.context_length,
                    timeout_s=env.episode_timeout_s,
                ),
            ),
        )
        self._running = asyncio.create_task(self._actor.run())
        return {"pid": os.getpid(), "host": socket.gethostname()}

    async def connect(self, address: PairAddress | Path) -> None:
        """Start the weight receiver beside the engine.

        Args:
            address: of this engine's sender: a pair of a collective transport, or a folder.
        """
        from skyrl_async.weight_sync.layout import WeightLayout
        from skyrl_async.weight_sync.receiver import WeightReceiver

        loop = asyncio.get_running_loop()
        timeout_s = self._config.weight_sync.timeout_s

        def load(weights: Mapping[str, Any], policy_version: int) -> None:
            swap = self._swap(weights, policy_version)
            asyncio.run_coroutine_threadsafe(swap, loop).result(timeout_s)

        expected = WeightLayout.of(self._model.named_parameters())
        self._receiver = WeightReceiver(_receiving_end(address, expected), load)

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start to play; returns at once."""
        self._actor.submit(assignments)

    async def poll(self, *, wait_s: float) -> RolloutReport:
        """Return what happened since the last report.

        Raises:
            RuntimeError: if the engine, a group, or the weight receiver failed.
        """
        if self._receiver is not None:
            self._receiver.check()
        return await self._actor.poll(wait_s=wait_s)

    async def evaluate(self, tasks: Sequence[Task]) -> EvaluationResult:
        """Play ``tasks`` greedily with the weights that the engine has now."""
        return await self._actor.evaluate(tasks)

    async def close(self) -> None:
        """Stop everything that this worker started."""
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.close)
        if self._running is not None:
            await self._actor.close()
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            await self._host.close()

    async def _swap(self, weights: Mapping[str, Any], policy_version: int) -> None:
        await self._engine.load_weights(weights, policy_version=policy_version)
        self._actor.engine_swapped()

    def _make_engine(self, model: Any, *, seed: int, policy_version: int = 0) -> EmbeddedEngine:
        from skyrl_async.rollout.embedded_engine import EmbeddedEngine

        engine = self._config.engine
        return EmbeddedEngine(
            model,
            max_concurrent=engine.max_concurrent,
            context_length=engine.context_length,
            kv_after_swap=engine.kv_after_swap,
            seed=seed,
            policy_version=policy_version,
        )

    def _make_evaluation_engine(self) -> EmbeddedEngine:
        """Return an engine around a copy of the model as it is now."""
        return self._make_engine(
            copy.deepcopy(self._model),
            seed=_EVALUATION_SEED,
            policy_version=self._engine.policy_version,
        )


def _receiving_end(address: PairAddress | Path, expected: WeightLayout) -> WeightReceiverTransport:
    if isinstance(address, Path):
        from skyrl_async.weight_sync.disk import DiskReceiver

        return DiskReceiver(address, expected=expected, policy_version=0)
    from skyrl_async.weight_sync.collective import CollectiveReceiver

    return CollectiveReceiver(address, expected=expected, policy_version=0)


def engine_name(index: int) -> str:
    """Return the name of rollout actor ``index`` and of its engine."""
    return f"rollout actor {index}"
