import asyncio

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import Sampling
from tests.rollout.embedded_engine_cases import (
    TOLERANCE,
    decode_steps,
    deviation,
    play_while_swapping,
    rough_model,
    roughened,
    running,
    versions_of,
    weights_of,
)

NUM_VERSIONS = 5


@pytest.mark.parametrize("max_prefill_tokens", [2048, 11])
def test_recompute_gives_the_logprobs_of_each_tokens_own_version(max_prefill_tokens):
    models = versions_of(rough_model(), count=NUM_VERSIONS)

    async def scenario():
        options = {"context_length": 100, "max_prefill_tokens": max_prefill_tokens}
        async with running(rough_model(), **options) as engine:
            return await play_while_swapping(engine, models, sessions=12)

    generations = asyncio.run(scenario())
    versions = [tuple(set(g.policy_versions.tolist())) for _, g in generations]
    assert set(sum(versions, ())) == set(range(NUM_VERSIONS))
    assert any(len(v) > 1 for v in versions), "no generation spans a swap"
    for prompt, generation in generations:
        assert deviation(models, prompt, generation) <= TOLERANCE


def test_keep_goes_on_with_the_old_keys_and_values():
    models = versions_of(rough_model(), count=NUM_VERSIONS)

    async def scenario(mode):
        async with running(rough_model(), context_length=100, kv_after_swap=mode) as engine:
            return await play_while_swapping(engine, models, sessions=12)

    generations = asyncio.run(scenario("keep"))
    before = [g for g in generations if set(g[1].policy_versions.tolist()) == {0}]
    assert before
    assert all(deviation(models, *pair) <= TOLERANCE for pair in before)
    # The same check that passes with recompute sees the mixed keys and values.
    assert max(deviation(models, *pair) for pair in generations) > 100 * TOLERANCE


@pytest.mark.parametrize(("mode", "prefilled"), [("recompute", 9), ("keep", 3)])
def test_a_session_uses_its_own_kv_after_a_swap_only_with_keep(mode, prefilled):
    models = versions_of(rough_model(), count=2)

    async def scenario():
        async with running(rough_model(), kv_after_swap=mode) as engine:
            one = Sampling(max_tokens=2)
            context = [1, 2, 3, 4, 5]
            reply = await engine.generate(context, one, request_id="a", session_id="s")
            await engine.load_weights(weights_of(models[1]), policy_version=1)
            engine.take_stats()
            context += [*reply.token_ids.tolist(), 6, 7]
            await engine.generate(context, one, request_id="b", session_id="s")
            return engine.take_stats()

    stats = asyncio.run(scenario())
    assert stats.prefilled_tokens == prefilled
    assert stats.reprefilled_tokens == 0


def test_reprefilled_tokens_are_counted_as_stall():
    models = versions_of(rough_model(), count=2)

    async def scenario():
        async with running(rough_model()) as engine:
            task = asyncio.create_task(
                engine.generate([1, 2, 3, 4], Sampling(max_tokens=9), request_id="a")
            )
            await decode_steps(engine, 3)
            await engine.load_weights(weights_of(models[1]), policy_version=1)
            return await task, engine.take_stats()

    generation, stats = asyncio.run(scenario())
    assert generation.policy_versions.tolist() == [0] * 3 + [1] * 6
    # Four of the prompt and two sampled ones had keys and values; the third is the next input.
    assert stats.reprefilled_tokens == 6
    assert stats.prefilled_tokens == 0
    assert stats.num_swaps == 1
    assert 0 < stats.swap_stall_s <= stats.busy_s


def test_the_given_tensors_become_the_parameters_without_a_copy():
    async def scenario():
        model = rough_model()
        first, second = weights_of(model), weights_of(model)
        async with running(model) as engine:
            pointers = []
            for version, weights in enumerate([first, second], 1):
                await engine.load_weights(weights, policy_version=version)
                pointers.append(
                    {name: p.data_ptr() for name, p in model.named_parameters()}
                    == {name: t.data_ptr() for name, t in weights.items()}
                )
            for tensor in first.values():
                tensor.fill_(float("nan"))  # free again since the second swap
            generation = await engine.generate([1, 2], Sampling(max_tokens=5), request_id="a")
            return pointers, generation

    pointers, generation = asyncio.run(scenario())
    assert pointers == [True, True]
    assert deviation([None, None, rough_model()], [1, 2], generation) <= TOLERANCE


def test_weights_can_be_loaded_before_the_engine_runs_and_while_it_is_paused():
    models = versions_of(rough_model(), count=3)

    async def scenario():
        engine = EmbeddedEngine(rough_model(), max_concurrent=2, context_length=64)
        await engine.load_weights(weights_of(models[1]), policy_version=1)
        runner = asyncio.create_task(engine.run())
        task = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=8), request_id="a"))
        await decode_steps(engine, 3)
        await engine.pause()
        await engine.load_weights(weights_of(models[2]), policy_version=2)
        await engine.resume()
        generation = await task
        runner.cancel()
        return generation, engine.policy_version

    generation, version = asyncio.run(scenario())
    assert version == 2
    assert generation.policy_versions.tolist() == [1] * 3 + [2] * 5
    assert deviation(models, [1, 2], generation) <= TOLERANCE


def test_a_tied_model_takes_its_weights_under_one_name_or_both():
    def build(seed):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        return roughened(LlamaForCausalLM(config), seed=seed)

    models = [build(0), build(1), build(2)]

    async def scenario():
        async with running(build(0)) as engine:
            await engine.load_weights(weights_of(models[1]), policy_version=1)
            one = await engine.generate([1, 2], Sampling(max_tokens=5), request_id="a")
            both = {name: t.clone() for name, t in models[2].state_dict().items()}
            wrong = dict(both, **{"lm_head.weight": both["lm_head.weight"] + 1})
            with pytest.raises(ValueError, match=r"lm_head\.weight.*tied"):
                await engine.load_weights(wrong, policy_version=2)
            assert "lm_head.weight" in both
            await engine.load_weights(both, policy_version=2)
            return one, await engine.generate([1, 2], Sampling(max_tokens=5), request_id="a")

    for generation in asyncio.run(scenario()):
        assert deviation(models, [1, 2], generation) <= TOLERANCE


NAME = "model.layers.1.mlp.up_proj.weight"


def without(weights):
    del weights[NAME]


def misnamed(weights):
    weights["model.layers.7.mlp.up_proj.weight"] = weights[NAME]


def misshapen(weights):
    weights[NAME] = weights[NAME].T.contiguous()


def other_dtype(weights):
    weights[NAME] = weights[NAME].to(torch.bfloat16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, r"missing parameter 'model\.layers\.1\.mlp\.up_proj"),
        (misnamed, r"unknown parameter 'model\.layers\.7"),
        (misshapen, r"up_proj\.weight' must be \(64, 32\)"),
        (other_dtype, r"got \(64, 32\) torch\.bfloat16"),
    ],
)
def test_bad_weights_are_refused_and_change_nothing(spoil, message):
    async def scenario():
        model = rough_model()
        weights = weights_of(rough_model(seed=9))
        spoil(weights)
        async with running(model) as engine:
            with pytest.raises(ValueError, match=message):
                await engine.load_weights(weights, policy_version=1)
            assert engine.policy_version == 0
            return await engine.generate([1, 2], Sampling(max_tokens=5), request_id="a")

    generation = asyncio.run(scenario())
    assert generation.policy_versions.tolist() == [0] * 5
    assert deviation([rough_model()], [1, 2], generation) <= TOLERANCE


@pytest.mark.parametrize("version", [3, 2])
def test_versions_must_increase(version):
    async def scenario():
        model = rough_model()
        async with running(model, policy_version=3) as engine:
            with pytest.raises(ValueError, match=f"has 3, got {version}"):
                await engine.load_weights(weights_of(model), policy_version=version)

    asyncio.run(scenario())
