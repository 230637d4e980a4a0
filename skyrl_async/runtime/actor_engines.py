"""What a rollout actor generates with: an engine in its process, or a pool of servers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.metrics.trace import NULL_TRACER, Lane, Tracing
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.runtime.engine_receiver import EngineReceiver
from skyrl_async.runtime.published_adapters import adapter_layout, publishes_adapters

if TYPE_CHECKING:
    from skyrl_async.learner.lora_merge import AdapterMerger
    from skyrl_async.rollout.actor import Engine
    from skyrl_async.rollout.embedded_engine import EmbeddedEngine
    from skyrl_async.rollout.engine_pool import EnginePool
    from skyrl_async.weight_sync.layout import WeightLayout
    from skyrl_async.weight_sync.receiving import Address

_EVALUATION_SEED = 1
_SEEDS_APART = 1_000_003
"""Between the seeds of two policy versions from which a run may go on; more than it has actors."""


class EmbeddedEngines:
    """One embedded engine with its weight receiver; evaluation gets a copy of the model.

    Args:
        config: of the run.
        index: of the actor, from 0.
        start_version: policy version from which the run goes on.
        tracer: gets a lane for the engine, and one for evaluations.
    """

    def __init__(
        self,
        config: Config,
        *,
        index: int,
        start_version: int = 0,
        tracer: Tracing = NULL_TRACER,
    ) -> None:
        import torch

        from skyrl_async.learner.policy import load_model
        from skyrl_async.runtime.settings import policy_source

        self._config = config
        torch.set_num_threads(config.engine.num_threads)
        model = load_model(policy_source(config)).requires_grad_(False)
        self._model = model.to(config.engine.device)
        self._merger = self._make_merger()
        seed = config.seed + index + _SEEDS_APART * start_version
        lane = tracer.lane(role="engine", name="engine")
        self._evaluation_lane = tracer.lane(role="evaluation", name="evaluation")
        self._engine = self._make(self._model, seed=seed, lane=lane)
        self._receiver = EngineReceiver(self._engine, timeout_s=config.weight_sync.timeout_s)

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
            lane=self._evaluation_lane,
        )

    def connect(self, address: Address, on_swap: Callable[[], None]) -> None:
        """Start the weight receiver beside the engine.

        Args:
            address: of this engine's sender.
            on_swap: called after every swap.
        """
        self._receiver.connect(
            address,
            expected=self._layout(),
            prepare=self._whole_weights,
            on_swap=on_swap,
            pinned=self._config.engine.device == "cuda",
        )

    def _whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        return weights if self._merger is None else self._merger.merge(weights)

    def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Raise: an embedded engine has no pool."""
        raise RuntimeError("engine.kind=embedded: a rollout actor has one engine, its own")

    def check(self) -> None:
        """Do nothing while the receiver works.

        Raises:
            RuntimeError: from what ended it.
        """
        self._receiver.check()

    async def close(self) -> None:
        """Stop receiving."""
        await self._receiver.close()

    def _make_merger(self) -> AdapterMerger | None:
        """Return what merges published adapters; None where whole weights are published."""
        from skyrl_async.learner.lora_merge import AdapterMerger
        from skyrl_async.runtime.settings import lora_settings

        lora = lora_settings(self._config)
        if lora is None or self._config.lora.publish == "merged":
            return None
        return AdapterMerger(self._model, scale=lora.scale)

    def _layout(self) -> WeightLayout:
        """Return the layout of what is published."""
        from skyrl_async.weight_sync.layout import WeightLayout

        if self._merger is None:
            return WeightLayout.of(self._model.named_parameters())
        return adapter_layout(self._config)

    def _make(
        self, model: Any, *, seed: int, lane: Lane, policy_version: int = 0
    ) -> EmbeddedEngine:
        from skyrl_async.rollout.embedded_engine import EmbeddedEngine

        engine = self._config.engine
        return EmbeddedEngine(
            model,
            max_concurrent=engine.max_concurrent,
            context_length=engine.context_length,
            kv_after_swap=engine.kv_after_swap,
            seed=seed,
            policy_version=policy_version,
            lane=lane,
        )


class ServerEngines:
    """A pool of SGLang servers, whose members the coordinator sets.

    Args:
        config: of the run.
        vocab_size: of the policy; a token id outside it would end a server.
        tracer: gets a lane for each server.
    """

    def __init__(self, config: Config, *, vocab_size: int, tracer: Tracing = NULL_TRACER) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._tracer = tracer
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
            adapters=publishes_adapters(self._config),
            tracer=self._tracer,
        )
