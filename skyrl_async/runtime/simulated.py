"""Builds what a run simulates, from the configuration: engines in rollout actors, the learner."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from skyrl_async.config import Config
from skyrl_async.distribution import parse_distribution
from skyrl_async.learner.policy import load_model, skeleton
from skyrl_async.metrics.trace import NULL_LANE, NULL_TRACER, Lane, Tracing
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.runtime.engine_receiver import EngineReceiver
from skyrl_async.runtime.settings import policy_source
from skyrl_async.simulate.engine import SimulatedEngine
from skyrl_async.simulate.learner import Ledger, SimulatedLearner, Weights
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.weight_sync.layout import WeightLayout

if TYPE_CHECKING:
    from skyrl_async.rollout.actor import Engine
    from skyrl_async.weight_sync.receiving import Address

_EVALUATION_SEED = 1


class SimulatedEngines:
    """One simulated engine with a real weight receiver, for one rollout actor.

    Args:
        config: of the run.
        index: of the actor, from 0.
        start_version: policy version from which the run goes on.
        tracer: gets a lane for the engine.
    """

    def __init__(
        self,
        config: Config,
        *,
        index: int,
        start_version: int = 0,
        tracer: Tracing = NULL_TRACER,
    ) -> None:
        self._config = config
        lane = tracer.lane(role="engine", name="engine")
        self._engine = self._make(seed=hash((config.seed, index, start_version)), lane=lane)
        self._receiver = EngineReceiver(self._engine, timeout_s=config.weight_sync.timeout_s)

    @property
    def engine(self) -> Engine:
        """That plays for training."""
        return self._engine

    def for_evaluation(self, endpoint: EngineEndpoint | None) -> Engine:
        """Return another engine of the version that this one has now."""
        return self._make(seed=_EVALUATION_SEED, policy_version=self._engine.policy_version)

    def connect(self, address: Address, on_swap: Callable[[], None]) -> None:
        """Start the weight receiver beside the engine.

        Args:
            address: of this engine's sender.
            on_swap: called after every swap.
        """
        self._receiver.connect(
            address, expected=self._layout(), prepare=self._take_time, on_swap=on_swap
        )

    def _take_time(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        time.sleep(self._config.simulate.load_s)
        return weights

    def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Raise: a simulated engine has no pool."""
        raise RuntimeError("simulate.engine=true: a rollout actor has one engine, its own")

    def check(self) -> None:
        """Do nothing while the receiver works.

        Raises:
            RuntimeError: from what ended it.
        """
        self._receiver.check()

    async def close(self) -> None:
        """Stop receiving."""
        await self._receiver.close()

    def _layout(self) -> WeightLayout:
        """Return the layout of what the learner publishes."""
        source = policy_source(self._config)
        model: Any = Weights(size_bytes=self._config.simulate.weight_bytes)
        if not self._config.simulate.learner:
            model = skeleton(source)
        return WeightLayout.of(model.named_parameters(), dtype=getattr(torch, source.dtype))

    def _make(
        self, *, seed: int, policy_version: int = 0, lane: Lane = NULL_LANE
    ) -> SimulatedEngine:
        config = self._config
        return SimulatedEngine(
            engine_times(config),
            reply_tokens=parse_distribution(config.simulate.reply_tokens),
            context_length=config.engine.context_length,
            seed=seed % 2**32,
            policy_version=policy_version,
            lane=lane,
        )


def engine_times(config: Config) -> EngineTimes:
    """Return how fast each simulated engine is."""
    simulate = config.simulate
    return EngineTimes(
        decode_step_s=simulate.decode_step_s,
        decode_step_s_per_sequence=simulate.decode_step_s_per_sequence,
        prefill_s_per_token=simulate.prefill_s_per_token,
        swap_stall_s=simulate.swap_stall_s,
        max_concurrent=config.engine.max_concurrent,
        recomputes_kv=config.engine.kv_after_swap == "recompute",
    )


def build_simulated_learner(config: Config, *, ledger: Ledger) -> SimulatedLearner:
    """Return a learner that takes the time given in the configuration.

    Real engines need weights of their own form, so for them the policy is loaded.
    """
    simulate = config.simulate
    model: Any = Weights(size_bytes=simulate.weight_bytes)
    if not simulate.engine:
        model = load_model(policy_source(config))
    times = StepTimes(step_s=simulate.step_s, step_s_per_token=simulate.step_s_per_token)
    return SimulatedLearner(model, times, ledger=ledger)
