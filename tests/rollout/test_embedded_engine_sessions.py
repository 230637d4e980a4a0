import asyncio
import random

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from skyrl_async.types import Sampling
from tests.rollout.embedded_engine_cases import (
    TOLERANCE,
    decode_steps,
    deviation,
    rough_model,
    roughened,
    running,
)


async def play_turns(engine, session_id, *, turns, seed):
    """Play a session; return (context, generation) of each turn."""
    rng = random.Random(seed)
    context, played = [rng.randrange(64) for _ in range(rng.randint(2, 6))], []
    for turn in range(turns):
        generation = await engine.generate(
            context,
            Sampling(max_tokens=rng.randint(1, 4)),
            request_id=f"{session_id}/{turn}",
            session_id=session_id,
        )
        played.append((context, generation))
        observation = [rng.randrange(64) for _ in range(rng.randint(0, 5))]
        context = context + generation.token_ids.tolist() + observation
    return played


def test_turns_of_a_session_compute_only_their_new_tokens():
    async def scenario():
        async with running(rough_model(), max_concurrent=8, context_length=64) as engine:
            played = await asyncio.gather(
                *(play_turns(engine, str(i), turns=5, seed=i) for i in range(8))
            )
            return played, engine.take_stats()

    played, stats = asyncio.run(scenario())
    prompts = sum(len(turns[-1][0]) for turns in played)
    sampled_last = sum(len(t[1].token_ids) for turns in played for t in turns[:-1])
    # Sampled tokens are computed as they are decoded, all but the last of each turn.
    assert stats.prefilled_tokens == prompts - sampled_last + 8 * 4
    for turns in played:
        for context, generation in turns:
            assert deviation([rough_model()], context, generation) <= TOLERANCE


def test_more_sessions_than_slots_evict_each_other_and_stay_correct():
    async def scenario():
        async with running(rough_model(), max_concurrent=3, num_slots=4) as engine:
            return await asyncio.gather(
                *(play_turns(engine, str(i), turns=4, seed=i) for i in range(13))
            )

    for turns in asyncio.run(scenario()):
        for context, generation in turns:
            assert deviation([rough_model()], context, generation) <= TOLERANCE


def test_the_least_recently_used_session_is_evicted_first():
    async def scenario():
        async with running(rough_model(), max_concurrent=2) as engine:
            one = Sampling(max_tokens=1)
            for session in ("old", "recent", "third"):
                await engine.generate([1, 2, 3, 4], one, request_id="r", session_id=session)
            computed = []
            for session in ("recent", "old"):
                engine.take_stats()
                await engine.generate([1, 2, 3, 4, 5], one, request_id="r", session_id=session)
                computed.append(engine.take_stats().prefilled_tokens)
            return computed

    assert asyncio.run(scenario()) == [1, 5]


def test_a_session_whose_context_changed_is_recomputed():
    async def scenario():
        async with running(rough_model()) as engine:
            four = Sampling(max_tokens=4)
            first = [1, 2, 3, 4, 5, 6]
            await engine.generate(first, four, request_id="a", session_id="s")
            engine.take_stats()
            changed = [1, 2, 9, 4, 5, 6, 7]
            other = await engine.generate(changed, four, request_id="b", session_id="s")
            recomputed = engine.take_stats().prefilled_tokens
            # A shorter context with the same beginning needs only its last token.
            shorter = await engine.generate(changed[:3], four, request_id="c", session_id="s")
            return changed, other, shorter, recomputed, engine.take_stats().prefilled_tokens

    changed, other, shorter, recomputed, reused = asyncio.run(scenario())
    assert (recomputed, reused) == (7, 1)
    assert deviation([rough_model()], changed, other) <= TOLERANCE
    assert deviation([rough_model()], changed[:3], shorter) <= TOLERANCE


def test_a_released_session_keeps_nothing():
    async def scenario():
        async with running(rough_model(), max_concurrent=1) as engine:
            one = Sampling(max_tokens=1)
            await engine.generate([1, 2], one, request_id="a", session_id="s")
            engine.release("s")
            engine.release("never seen")
            engine.take_stats()
            live = asyncio.create_task(
                engine.generate([1, 2, 3], Sampling(max_tokens=5), request_id="b", session_id="s")
            )
            await decode_steps(engine, 1)
            engine.release("s")
            await live
            engine.take_stats()
            await engine.generate([1, 2, 3], one, request_id="c", session_id="s")
            return engine.take_stats().prefilled_tokens

    assert asyncio.run(scenario()) == 3


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_other_model_families_work(family):
    def build():
        if family == "gpt2":
            config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
            return roughened(GPT2LMHeadModel(config), seed=1)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return roughened(LlamaForCausalLM(config), seed=1)

    async def scenario():
        async with running(build()) as engine:
            return await asyncio.gather(
                *(play_turns(engine, str(i), turns=3, seed=i) for i in range(10))
            )

    reference = build()
    for turns in asyncio.run(scenario()):
        for context, generation in turns:
            assert deviation([reference], context, generation) <= TOLERANCE
