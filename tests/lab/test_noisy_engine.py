"""Only the reported logprobs change, by noise of the given size, the same for the same request."""

from __future__ import annotations

import asyncio
import inspect

import numpy as np
import pytest

from skyrl_async.distribution import parse_distribution
from skyrl_async.lab.noisy_engine import NoisyEngine
from skyrl_async.rollout.actor import Engine
from skyrl_async.simulate.engine import SimulatedEngine
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.types import Generation, Sampling

NUM_TOKENS = 4000


def instant_engine() -> SimulatedEngine:
    """Give the same long reply to everything, with logprobs of -1."""
    return SimulatedEngine(
        EngineTimes(),
        reply_tokens=parse_distribution(f"fixed:{NUM_TOKENS}"),
        context_length=2 * NUM_TOKENS,
        policy_version=7,
    )


def generate(std: float, *, seed: int = 0, request_id: str = "0-0/0", ids: int = 1) -> Generation:
    async def scenario() -> Generation:
        engine = NoisyEngine(instant_engine(), std=std, seed=seed)
        sampling = Sampling(max_tokens=NUM_TOKENS)
        return await engine.generate([ids], sampling, request_id=request_id)

    return asyncio.run(scenario())


def test_the_noise_has_the_given_size_and_mean_zero():
    noise = generate(0.2).logprobs - -1.0
    assert np.std(noise) == pytest.approx(0.2, rel=0.05)
    assert np.mean(noise) == pytest.approx(0, abs=4 * 0.2 / np.sqrt(NUM_TOKENS))


def test_nothing_else_changes():
    plain, noisy = generate(0.0), generate(0.5)
    assert np.array_equal(noisy.token_ids, plain.token_ids)
    assert np.array_equal(noisy.policy_versions, plain.policy_versions)
    assert noisy.logprobs.dtype == np.float32
    assert np.array_equal(plain.logprobs, np.full(NUM_TOKENS, -1.0, np.float32))


def test_a_logprob_never_rises_above_zero():
    logprobs = generate(4.0).logprobs
    assert logprobs.max() == 0.0


def test_noise_depends_on_request_and_seed_alone():
    first = generate(0.5).logprobs
    assert np.array_equal(generate(0.5, ids=3).logprobs, first)
    assert not np.array_equal(generate(0.5, request_id="0-1/0").logprobs, first)
    assert not np.array_equal(generate(0.5, seed=1).logprobs, first)


def test_everything_else_is_the_engine_s_own():
    engine = instant_engine()
    noisy = NoisyEngine(engine, std=0.1, seed=0)
    members = [name for name, _ in inspect.getmembers(Engine, callable) if name[0] != "_"]
    assert {"abort", "load_weights", "run"} < set(members)
    for name in members:
        assert (getattr(noisy, name) == getattr(engine, name)) == (name != "generate"), name
    assert noisy.policy_version == engine.policy_version == 7


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match=r"std must be >= 0, got -0\.1"):
        NoisyEngine(instant_engine(), std=-0.1, seed=0)
