"""An engine that reports wrong logprobs: numerical mismatch of engine and learner, on purpose."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from skyrl_async.rollout.actor import Engine
from skyrl_async.types import Generation, Int32Array, Sampling


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
        # All but the logprobs is the engine's own affair.
        self.abort, self.release = engine.abort, engine.release
        self.pause, self.resume = engine.pause, engine.resume
        self.load_weights = engine.load_weights
        self.run, self.take_stats = engine.run, engine.take_stats

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
