"""What a rollout actor generates with: an engine in its process, or a pool of servers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.rollout.endpoint import EngineEndpoint

if TYPE_CHECKING:
    from skyrl_async.rollout.actor import Engine
    from skyrl_async.rollout.embedded_engine import EmbeddedEngine
    from skyrl_async.rollout.engine_pool import EnginePool
    from skyrl_async.weight_sync.receiving import Address

_EVALUATION_SEED = 1


class EmbeddedEngines:
    """One embedded engine with its weight receiver; evaluation gets a copy of the model.

    Args:
        config: of the run.
        index: of the actor, from 0.
    """

    def __init__(self, config: Config, *, index: int) -> None:
        import torch

        from skyrl_async.learner.policy import load_model
        from skyrl_async.runtime.settings import policy_source

        self._config = config
        torch.set_num_threads(config.engine.num_threads)
        self._model = load_model(policy_source(config)).requires_grad_(False)
        self._engine = self._make(self._model, seed=config.seed + index)
        self._receiver: Any = None

    @property
    def engine(self) -> Engine:
        """That plays for training."""
        return self._engine

    def for_evaluation(self, endpoint: EngineEndpoint | None) -> Engine:
        """Return an engine around a copy of the model as it is now."""
        return self._make(
            copy.deepcopy(self._model),
            seed=_EVALUATION_SEED,
            policy_version=self._engine.policy_version,
        )

    def connect(self, address: Address, on_swap: Callable[[], None]) -> None:
        """Start the weight receiver beside the engine.

        Args:
            address: of this engine's sender.
            on_swap: called after every swap.
        """
        from skyrl_async.weight_sync.layout import WeightLayout
        from skyrl_async.weight_sync.receiver import WeightReceiver
        from skyrl_async.weight_sync.receiving import receiving_end

        loop = asyncio.get_running_loop()
        timeout_s = self._config.weight_sync.timeout_s

        async def swap(weights: Mapping[str, Any], policy_version: int) -> None:
            await self._engine.load_weights(weights, policy_version=policy_version)
            on_swap()

        def load(weights: Mapping[str, Any], policy_version: int) -> None:
            swapping = asyncio.run_coroutine_threadsafe(swap(weights, policy_version), loop)
            swapping.result(timeout_s)

        expected = WeightLayout.of(self._model.named_parameters())
        transport = receiving_end(address, expected=expected, policy_version=0)
        self._receiver = WeightReceiver(transport, load)

    def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Raise: an embedded engine has no pool."""
        raise RuntimeError("engine.kind=embedded: a rollout actor has one engine, its own")

    def check(self) -> None:
        """Do nothing while the receiver works.

        Raises:
            RuntimeError: from what ended it.
        """
        if self._receiver is not None:
            self._receiver.check()

    async def close(self) -> None:
        """Stop receiving."""
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.close)

    def _make(self, model: Any, *, seed: int, policy_version: int = 0) -> EmbeddedEngine:
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


class ServerEngines:
    """A pool of SGLang servers, whose members the coordinator sets.

    Args:
        config: of the run.
        vocab_size: of the policy; a token id outside it would end a server.
    """

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._pool = self._make()

    @property
    def engine(self) -> Engine:
        """That plays for training."""
        return self._pool

    def for_evaluation(self, endpoint: EngineEndpoint | None) -> Engine:
        """Return a pool of one server, which keeps its weights meanwhile.

        Raises:
            ValueError: without an endpoint.
        """
        if endpoint is None:
            raise ValueError("an evaluation with SGLang servers needs the endpoint of one")
        return self._pool.pinned(endpoint)

    def connect(self, address: Address, on_swap: Callable[[], None]) -> None:
        """Raise: the receiver is beside the server, not beside the actor."""
        raise RuntimeError("engine.kind=sglang: weights go to the servers, not to rollout actors")

    def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Play with these servers from now on."""
        self._pool.set_engines(endpoints)

    def check(self) -> None:
        """Do nothing: the pool survives the loss of all its servers."""

    async def close(self) -> None:
        """Nothing is open while the pool does not run."""

    def _make(self) -> EnginePool:
        from skyrl_async.rollout.engine_pool import EnginePool

        engine, environment = self._config.engine, self._config.environment
        return EnginePool(
            vocab_size=self._vocab_size,
            context_length=engine.context_length,
            kv_after_swap=engine.kv_after_swap,
            # Every actor has a pool of its own over the same servers.
            max_concurrent=-(-engine.max_concurrent // self._config.rollout.num_actors),
            stall_timeout_s=engine.hang_timeout_s,
            request_timeout_s=environment.episode_timeout_s,
        )
