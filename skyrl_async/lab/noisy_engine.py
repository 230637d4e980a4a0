"""An engine that reports wrong logprobs: numerical mismatch of engine and learner, on purpose."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from skyrl_async.rollout.actor import Engine
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.types import Generation, Int32Array, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class NoisyEngine:
    """Adds Gaussian noise to the logprobs that another engine reports; tokens stay as they are.

    A logprob that would rise above 0 is 0. The noise of a request depends on its id and the seed
    alone, so it is the same in whatever order requests are served.

    Args:
        engine: that generates.
        std: of the noise, in nats.
        seed: of the noise.

    Raises:
        ValueError: if ``std`` is negative.
    """

    def __init__(self, engine: Engine, *, std: float, seed: int) -> None:
        if std < 0:
            raise ValueError(f"std must be >= 0, got {std}")
        self._engine = engine
        self._std = std
        self._seed = seed

    @property
    def policy_version(self) -> int:
        """Version of the weights that compute the next token."""
        return self._engine.policy_version

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str | None = None,
    ) -> Generation:
        """Continue ``token_ids``, and report noisy logprobs."""
        generation = await self._engine.generate(
            token_ids, sampling, request_id=request_id, session_id=session_id
        )
        random = np.random.default_rng((self._seed, zlib.crc32(request_id.encode())))
        noise = random.normal(0.0, self._std, generation.logprobs.shape)
        noisy = np.minimum(generation.logprobs + noise, 0.0).astype(generation.logprobs.dtype)
        return replace(generation, logprobs=noisy)

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._engine.abort(request_id)

    def release(self, session_id: str) -> None:
        """Say that no further turn of a session will come."""
        self._engine.release(session_id)

    async def pause(self) -> None:
        """Stop computing after the current decode step."""
        await self._engine.pause()

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        await self._engine.resume()

    async def load_weights(self, weights: Mapping[str, Tensor], *, policy_version: int) -> None:
        """Replace all parameters between two decode steps."""
        await self._engine.load_weights(weights, policy_version=policy_version)

    async def run(self) -> None:
        """Generate until cancelled."""
        await self._engine.run()

    def take_stats(self) -> EngineStats:
        """Return what it did since the last call."""
        return self._engine.take_stats()
