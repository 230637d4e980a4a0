"""Only the reported logprobs change, by noise of the given size, the same for the same request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from skyrl_async.lab.noisy_engine import NoisyEngine
from skyrl_async.types import FinishReason, Generation, Sampling

NUM_TOKENS = 4000


class FixedEngine:
    """Gives the same long reply to everything."""

    policy_version = 7

    async def generate(self, token_ids: Any, sampling: Sampling, **ids: Any) -> Generation:
        return Generation(
            token_ids=np.arange(NUM_TOKENS, dtype=np.int32) % 50,
            logprobs=np.full(NUM_TOKENS, -3.0, np.float32),
            policy_versions=np.full(NUM_TOKENS, 7, np.int32),
            temperature=1.0,
            finish_reason=FinishReason.LENGTH,
        )


def generate(std: float, *, seed: int = 0, request_id: str = "0-0/0", ids: int = 1) -> Generation:
    engine = NoisyEngine(cast(Any, FixedEngine()), std=std, seed=seed)
    sampling = Sampling(max_tokens=NUM_TOKENS)
    return asyncio.run(engine.generate([ids], sampling, request_id=request_id))


def test_the_noise_has_the_given_size_and_mean_zero():
    noise = generate(0.5).logprobs - -3.0
    assert np.std(noise) == pytest.approx(0.5, rel=0.05)
    assert np.mean(noise) == pytest.approx(0, abs=4 * 0.5 / np.sqrt(NUM_TOKENS))


def test_nothing_else_changes():
    plain, noisy = generate(0.0), generate(0.5)
    assert np.array_equal(noisy.token_ids, plain.token_ids)
    assert np.array_equal(noisy.policy_versions, plain.policy_versions)
    assert noisy.logprobs.dtype == np.float32
    assert np.array_equal(plain.logprobs, np.full(NUM_TOKENS, -3.0, np.float32))


def test_a_logprob_never_rises_above_zero():
    logprobs = generate(4.0).logprobs
    assert logprobs.max() == 0.0


def test_noise_depends_on_request_and_seed_alone():
    first = generate(0.5).logprobs
    assert np.array_equal(generate(0.5, ids=3).logprobs, first)
    assert not np.array_equal(generate(0.5, request_id="0-1/0").logprobs, first)
    assert not np.array_equal(generate(0.5, seed=1).logprobs, first)


def test_the_version_is_that_of_the_engine():
    assert NoisyEngine(cast(Any, FixedEngine()), std=0.1, seed=0).policy_version == 7


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match=r"std must be >= 0, got -0\.1"):
        NoisyEngine(cast(Any, FixedEngine()), std=-0.1, seed=0)
