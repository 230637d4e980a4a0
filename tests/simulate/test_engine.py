import asyncio
import contextlib
import time

import numpy as np
import pytest

from skyrl_async.distribution import parse_distribution
from skyrl_async.simulate.engine import SimulatedEngine
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.types import FinishReason, Sampling

SAMPLING = Sampling(max_tokens=20, stop_token_ids=(0,))


def run(play, *, tokens="fixed:5", context_length=100, **times):
    """Run ``play(engine)`` beside the engine and return what it returns."""

    async def main():
        engine = SimulatedEngine(
            EngineTimes(**times),
            reply_tokens=parse_distribution(tokens),
            context_length=context_length,
        )
        running = asyncio.create_task(engine.run())
        await asyncio.sleep(0)
        try:
            return await asyncio.wait_for(play(engine), 10)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    return asyncio.run(main())


def test_a_reply_has_the_drawn_length_its_version_and_a_stop_token():
    generation = run(lambda e: e.generate([1, 2, 3], SAMPLING, request_id="r"))
    assert generation.finish_reason is FinishReason.STOP
    assert generation.token_ids.tolist() == [1, 1, 1, 1, 0]
    assert generation.policy_versions.tolist() == [0] * 5
    assert (generation.logprobs == -1).all()


@pytest.mark.parametrize(("context_length", "length"), [(100, 20), (10, 7)])
def test_a_long_reply_is_cut_at_the_limits(context_length, length):
    generation = run(
        lambda e: e.generate([1, 2, 3], SAMPLING, request_id="r"),
        tokens="fixed:50",
        context_length=context_length,
    )
    assert generation.finish_reason is FinishReason.LENGTH
    assert len(generation.token_ids) == length


def test_replies_take_the_time_of_their_decode_steps_together():
    async def play(engine):
        started = time.monotonic()
        calls = (engine.generate([1], SAMPLING, request_id=str(n)) for n in range(8))
        await asyncio.gather(*calls)
        return time.monotonic() - started, engine.take_stats()

    # 5 tokens at 10 ms and 8 x 1 ms a step.
    seconds, stats = run(play, decode_step_s=0.01, decode_step_s_per_sequence=0.001)
    assert 0.09 <= seconds < 0.2
    assert (stats.generated_tokens, stats.finished_requests, stats.prefilled_tokens) == (40, 8, 8)
    assert stats.busy_s == pytest.approx(0.09, abs=0.001)


def test_a_swap_in_the_middle_of_a_reply_changes_the_version_of_later_tokens():
    async def play(engine):
        reply = asyncio.create_task(engine.generate([1], SAMPLING, request_id="r"))
        await asyncio.sleep(0.05)
        await engine.load_weights({}, policy_version=7)
        with pytest.raises(ValueError, match="must increase"):
            await engine.load_weights({}, policy_version=7)
        return await reply, engine.policy_version

    generation, version = run(play, decode_step_s=0.02)
    versions = generation.policy_versions
    assert version == 7
    assert set(versions.tolist()) == {0, 7} and (np.diff(versions) >= 0).all()


def test_an_aborted_request_returns_the_tokens_it_has():
    async def play(engine):
        reply = asyncio.create_task(engine.generate([1], SAMPLING, request_id="r"))
        await asyncio.sleep(0.05)
        engine.abort("r")
        engine.abort("unknown")
        return await reply

    generation = run(play, decode_step_s=0.02)
    assert generation.finish_reason is FinishReason.ABORT
    assert 1 <= len(generation.token_ids) <= 3


def test_later_turns_of_a_session_compute_their_new_tokens_only_until_a_swap():
    async def play(engine):
        async def turn(context):
            await engine.generate([1] * context, SAMPLING, request_id="r", session_id="s")
            return engine.take_stats().prefilled_tokens

        counts = [await turn(10), await turn(18)]  # 10 and 5 are known
        await engine.load_weights({}, policy_version=1)
        counts.append(await turn(25))
        engine.release("s")
        return [*counts, await turn(30)]

    assert run(play) == [10, 3, 25, 30]


def test_waiters_of_a_stopped_engine_get_an_error():
    async def main():
        engine = SimulatedEngine(
            EngineTimes(decode_step_s=10),
            reply_tokens=parse_distribution("fixed:5"),
            context_length=9,
        )
        running = asyncio.create_task(engine.run())
        reply = asyncio.create_task(engine.generate([1], SAMPLING, request_id="r"))
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="in use"):
            await engine.generate([1], SAMPLING, request_id="r")
        with pytest.raises(ValueError, match="needs 1 to 8"):
            await engine.generate([1] * 9, SAMPLING, request_id="long")
        running.cancel()
        with pytest.raises(RuntimeError, match="stopped before"):
            await reply
        with pytest.raises(RuntimeError, match="takes no requests"):
            await engine.generate([1], SAMPLING, request_id="late")

    asyncio.run(main())
