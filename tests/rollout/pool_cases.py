"""A running pool around fake servers, and what its replies must be."""

import asyncio
import contextlib

import pytest

from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.types import Sampling
from tests.rollout.fake_sglang import VOCAB_SIZE, continuation, logprob_of

CONTEXT = [5, 6, 7]


@contextlib.asynccontextmanager
async def pool_of(*members, version=3, **options):
    """A running pool of ``members``, named e0, e1 and so on."""
    values = {"poll_interval_s": 0.02, "stream_interval": 4, "stall_timeout_s": 0.2}
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=512, **{**values, **options})
    runner = asyncio.create_task(pool.run())
    pool.set_engines(endpoints_of(members, version=version))
    await until(lambda: all(m.greeted or m.failure for m in pool._router.members.values()))
    try:
        yield pool
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


def endpoints_of(members, *, version=3):
    return [server.endpoint(f"e{i}", version) for i, server in enumerate(members)]


def ask(pool, name="7-0/0", *, session=None, max_tokens=30, context=CONTEXT, **options):
    sampling = Sampling(max_tokens=max_tokens, **options)
    return pool.generate(context, sampling, request_id=name, session_id=session)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def check_whole(generation, count=30):
    """It is what one undisturbed server would have generated."""
    expected = continuation(CONTEXT, count)
    assert generation.token_ids.tolist() == expected
    assert generation.logprobs.tolist() == pytest.approx([logprob_of(t) for t in expected])
