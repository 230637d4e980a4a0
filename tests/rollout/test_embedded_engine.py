import asyncio
import random

import numpy as np
import pytest
import torch

from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import FinishReason, Sampling
from tests.rollout.embedded_engine_cases import (
    TOLERANCE,
    decode_steps,
    deviation,
    reference_logprobs,
    rough_model,
    running,
    weights_of,
)


def prompts_of(count, *, longest=20, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(64) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy_reply(model, prompt, count):
    context = list(prompt)
    for _ in range(count):
        context.append(int(reference_logprobs(model, context, temperature=1.0)[-1].argmax()))
    return context[len(prompt) :]


def test_greedy_replies_of_concurrent_requests_equal_a_plain_decode_loop():
    async def scenario():
        prompts = prompts_of(20)
        sampling = Sampling(max_tokens=9, temperature=0)
        async with running(rough_model(), max_concurrent=6) as engine:
            calls = [engine.generate(p, sampling, request_id=str(i)) for i, p in enumerate(prompts)]
            return prompts, await asyncio.gather(*calls)

    model = rough_model()
    for prompt, generation in zip(*asyncio.run(scenario()), strict=True):
        assert generation.token_ids.tolist() == greedy_reply(model, prompt, 9)
        assert generation.finish_reason is FinishReason.LENGTH
        assert generation.temperature == 1.0
        assert deviation([model], prompt, generation) <= TOLERANCE


def test_logprobs_are_those_of_each_requests_own_temperature():
    async def scenario():
        prompts = prompts_of(12)
        temperatures = [0.3, 1.0, 1.7] * 4
        async with running(rough_model()) as engine:
            calls = [
                engine.generate(
                    np.array(p, np.int32), Sampling(max_tokens=15, temperature=t), request_id=str(i)
                )
                for i, (p, t) in enumerate(zip(prompts, temperatures, strict=True))
            ]
            return prompts, temperatures, await asyncio.gather(*calls)

    model = rough_model()
    for prompt, temperature, generation in zip(*asyncio.run(scenario()), strict=True):
        assert generation.temperature == temperature
        assert len(generation.token_ids) == 15
        assert deviation([model], prompt, generation) <= TOLERANCE


def test_a_stop_token_ends_the_reply_and_is_part_of_it():
    reply = greedy_reply(rough_model(), [1, 2, 3], 8)
    stop = reply[3]

    async def scenario():
        sampling = Sampling(max_tokens=8, temperature=0, stop_token_ids=(stop,))
        async with running(rough_model()) as engine:
            return await engine.generate([1, 2, 3], sampling, request_id="a")

    generation = asyncio.run(scenario())
    assert generation.token_ids.tolist() == reply[: reply.index(stop) + 1]
    assert generation.finish_reason is FinishReason.STOP


def test_the_context_length_ends_the_reply():
    async def scenario():
        async with running(rough_model(), context_length=10) as engine:
            return await engine.generate([1] * 7, Sampling(max_tokens=9), request_id="a")

    generation = asyncio.run(scenario())
    assert len(generation.token_ids) == 3
    assert generation.finish_reason is FinishReason.LENGTH


def test_a_prompt_longer_than_the_prefill_limit_is_computed_in_parts():
    async def scenario():
        prompt = prompts_of(1, longest=64, seed=3)[0] * 3
        prompt = prompt[:50]
        async with running(rough_model(), max_prefill_tokens=7) as engine:
            short = asyncio.create_task(
                engine.generate([5], Sampling(max_tokens=12), request_id="short")
            )
            long = await engine.generate(prompt, Sampling(max_tokens=4), request_id="long")
            return prompt, long, await short

    prompt, long, short = asyncio.run(scenario())
    assert deviation([rough_model()], prompt, long) <= TOLERANCE
    assert deviation([rough_model()], [5], short) <= TOLERANCE


def test_identical_prompts_are_computed_once():
    async def scenario():
        prompt = prompts_of(1, seed=5)[0]
        async with running(rough_model(), max_concurrent=16) as engine:
            calls = [
                engine.generate(prompt, Sampling(max_tokens=6), request_id=str(i))
                for i in range(16)
            ]
            return prompt, await asyncio.gather(*calls), engine.take_stats()

    prompt, generations, stats = asyncio.run(scenario())
    assert stats.prefilled_tokens == len(prompt)
    assert stats.generated_tokens == 16 * 6
    assert stats.decode_steps == 6
    assert len({tuple(g.token_ids.tolist()) for g in generations}) > 8
    assert all(deviation([rough_model()], prompt, g) <= TOLERANCE for g in generations)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "must not be empty"),
        ([1] * 16, "context_length 16"),
        ([3, 64], "token id 64 is outside the vocabulary of 64"),
        ([-1], "token id -1"),
    ],
)
def test_a_bad_prompt_fails_its_caller_alone(token_ids, message):
    async def scenario():
        async with running(rough_model(), context_length=16) as engine:
            good = asyncio.create_task(
                engine.generate([1], Sampling(max_tokens=5), request_id="good")
            )
            await decode_steps(engine, 1)
            with pytest.raises(ValueError, match=message):
                await engine.generate(token_ids, Sampling(max_tokens=5), request_id="bad")
            return await good

    assert len(asyncio.run(scenario()).token_ids) == 5


def test_live_request_and_session_ids_must_be_unique():
    async def scenario():
        async with running(rough_model()) as engine:
            many = Sampling(max_tokens=5)
            first = asyncio.create_task(engine.generate([1], many, request_id="a", session_id="s"))
            await decode_steps(engine, 1)
            with pytest.raises(ValueError, match="request_id 'a'"):
                await engine.generate([1], many, request_id="a")
            with pytest.raises(ValueError, match="session 's'"):
                await engine.generate([1], many, request_id="b", session_id="s")
            await first
            return await engine.generate([1], many, request_id="a", session_id="s")

    assert len(asyncio.run(scenario()).token_ids) == 5


def test_abort_returns_the_tokens_so_far():
    async def scenario():
        async with running(rough_model(), max_concurrent=1) as engine:
            many = Sampling(max_tokens=50)
            first = asyncio.create_task(engine.generate([1, 2], many, request_id="a"))
            second = asyncio.create_task(engine.generate([1], many, request_id="b"))
            await decode_steps(engine, 7)
            engine.abort("b")
            engine.abort("a")
            engine.abort("never seen")
            partial, nothing = await asyncio.gather(first, second)
            after = await engine.generate([3], Sampling(max_tokens=2), request_id="a")
            return partial, nothing, after

    partial, nothing, after = asyncio.run(scenario())
    assert partial.finish_reason is nothing.finish_reason is FinishReason.ABORT
    assert (len(partial.token_ids), len(nothing.token_ids)) == (7, 0)
    assert deviation([rough_model()], [1, 2], partial) <= TOLERANCE
    assert deviation([rough_model()], [3], after) <= TOLERANCE


def test_cancelling_a_caller_frees_its_slot():
    async def scenario():
        async with running(rough_model(), max_concurrent=1) as engine:
            task = asyncio.create_task(
                engine.generate([1], Sampling(max_tokens=50), request_id="a")
            )
            await decode_steps(engine, 2)
            task.cancel()
            generation = await engine.generate([2], Sampling(max_tokens=3), request_id="b")
            return generation, task.cancelled(), engine.take_stats()

    generation, cancelled, stats = asyncio.run(scenario())
    assert cancelled
    assert len(generation.token_ids) == 3
    assert (stats.running, stats.waiting) == (0, 0)


def test_pause_keeps_requests_and_resume_goes_on():
    async def scenario():
        async with running(rough_model()) as engine:
            task = asyncio.create_task(
                engine.generate([1], Sampling(max_tokens=10), request_id="a")
            )
            await decode_steps(engine, 4)
            await engine.pause()
            engine.take_stats()
            for _ in range(50):
                await asyncio.sleep(0)
            paused = engine.take_stats()
            await engine.resume()
            return paused, await task

    paused, generation = asyncio.run(scenario())
    assert (paused.decode_steps, paused.running) == (0, 1)
    assert len(generation.token_ids) == 10
    assert deviation([rough_model()], [1], generation) <= TOLERANCE


def test_the_same_seed_and_order_give_the_same_tokens():
    async def scenario(seed):
        async with running(rough_model(), seed=seed) as engine:
            calls = [
                engine.generate(p, Sampling(max_tokens=8), request_id=str(i))
                for i, p in enumerate(prompts_of(12))
            ]
            return [g.token_ids.tolist() for g in await asyncio.gather(*calls)]

    assert asyncio.run(scenario(3)) == asyncio.run(scenario(3))
    assert asyncio.run(scenario(3)) != asyncio.run(scenario(4))


def test_logits_that_are_not_finite_fail_the_request_and_do_not_poison_its_slot():
    async def scenario():
        model = rough_model()
        good, bad = weights_of(model), weights_of(model)
        bad["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
        async with running(model, max_concurrent=1) as engine:
            task = asyncio.create_task(
                engine.generate([1, 2, 3], Sampling(max_tokens=9), request_id="a", session_id="s")
            )
            await decode_steps(engine, 2)
            await engine.load_weights(bad, policy_version=1)
            with pytest.raises(RuntimeError, match=r"request 'a' are not finite.*version 1"):
                await task
            await engine.load_weights(good, policy_version=2)
            return await engine.generate([4], Sampling(max_tokens=9), request_id="b")

    generation = asyncio.run(scenario())
    assert set(generation.policy_versions.tolist()) == {2}
    assert deviation([None, None, rough_model()], [4], generation) <= TOLERANCE


def test_waiters_fail_when_the_engine_stops():
    async def scenario():
        engine = EmbeddedEngine(rough_model(), max_concurrent=1, context_length=64)
        runner = asyncio.create_task(engine.run())
        many = Sampling(max_tokens=50)
        tasks = [
            asyncio.create_task(engine.generate([1], many, request_id=str(i))) for i in range(2)
        ]
        await decode_steps(engine, 2)
        with pytest.raises(RuntimeError, match="can be called once"):
            await engine.run()
        runner.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(RuntimeError, match="has stopped"):
            await engine.generate([1], many, request_id="late")
        return results

    results = asyncio.run(scenario())
    assert all(isinstance(r, RuntimeError) and "stopped before" in str(r) for r in results)


def test_a_failing_forward_pass_ends_the_run_and_its_waiters():
    async def scenario():
        model = rough_model()
        engine = EmbeddedEngine(model, max_concurrent=1, context_length=64)

        def explode(*_):
            raise ArithmeticError("broken hook")

        model.model.layers[1].register_forward_pre_hook(explode)
        runner = asyncio.create_task(engine.run())
        with pytest.raises(RuntimeError, match="broken hook"):
            await engine.generate([1], Sampling(max_tokens=1), request_id="a")
        with pytest.raises(ArithmeticError):
            await runner

    asyncio.run(scenario())


def test_the_cache_starts_small_and_grows_to_what_is_used():
    async def scenario():
        model = rough_model()
        async with running(model, max_concurrent=64, context_length=2048) as engine:
            await engine.generate([1], Sampling(max_tokens=2), request_id="a")
            small = engine.kv_cache_bytes
            prompt = [1] * 150
            generation = await engine.generate(prompt, Sampling(max_tokens=2), request_id="a")
            return small, engine.kv_cache_bytes, prompt, generation

    small, grown, prompt, generation = asyncio.run(scenario())
    all_slots = 64 * 2048 * 2 * 2 * 2 * 8 * 4  # slots, positions, layers, k/v, heads, dim, bytes
    assert small < grown < all_slots / 20
    assert deviation([rough_model()], prompt, generation) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"num_slots": 2}, "got 8 of 2 slots"),
        ({"context_length": 1}, "context_length"),
        ({"context_length": 5000}, "4096 positions"),
        ({"kv_after_swap": "forget"}, "forget"),
    ],
)
def test_bad_options_are_refused(options, message):
    defaults = {"max_concurrent": 8, "context_length": 64}
    with pytest.raises(ValueError, match=message):
        EmbeddedEngine(rough_model(), **(defaults | options))


def test_stats_account_for_all_tokens_and_all_time():
    async def scenario():
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with running(rough_model()) as engine:
            calls = [
                engine.generate([i, 1, 2], Sampling(max_tokens=5), request_id=str(i))
                for i in range(12)
            ]
            await asyncio.gather(*calls)
            return engine.take_stats(), loop.time() - started, engine.take_stats()

    stats, elapsed_s, after = asyncio.run(scenario())
    assert stats.finished_requests == 12
    assert stats.generated_tokens == 60
    assert stats.prefilled_tokens == 36
    assert stats.decode_steps == 10  # eight at once, then four
    assert stats.reprefilled_tokens == stats.num_swaps == 0
    assert stats.longest_gap_s > 0
    assert stats.longest_gap_decode_steps >= 1
    assert stats.busy_s + stats.yielded_s + stats.idle_s <= elapsed_s
    assert stats.busy_s > 0.3 * elapsed_s
    assert after.generated_tokens == 0


def test_plain_forward_passes_of_the_model_still_work():
    model, untouched = rough_model(), rough_model()
    EmbeddedEngine(model, max_concurrent=1, context_length=64)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, untouched(ids).logits)
