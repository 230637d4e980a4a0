"""The embedded engine samples from what each family of models computes, or refuses the model."""

import asyncio
import copy
from types import MethodType

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from skyrl_async.rollout import slot_attention
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import Sampling
from tests.models.families import CONTEXT_LENGTH, FAMILIES, WINDOW, family_model
from tests.rollout.embedded_engine_cases import (
    TOLERANCE,
    deviation,
    play_while_swapping,
    running,
    versions_of,
)

NUM_VERSIONS = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_logprob_is_that_of_a_plain_pass_of_its_version(family):
    models = versions_of(family_model(family), count=NUM_VERSIONS)

    async def scenario():
        options = {"context_length": CONTEXT_LENGTH, "max_prefill_tokens": 40}
        async with running(copy.deepcopy(models[0]), **options) as engine:
            return await play_while_swapping(engine, models, sessions=10)

    generations = asyncio.run(scenario())
    assert {v for _, g in generations for v in g.policy_versions.tolist()} == {0, 1, 2}
    assert max(len(p) + len(g.token_ids) for p, g in generations) > 3 * WINDOW
    assert max(deviation(models, *pair) for pair in generations) <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "mistral_window", "qwen3"])
def test_long_prompts_are_attended_to_in_parts(family, monkeypatch):
    limit = 4 * 3 * 4 * 64 * 5
    monkeypatch.setattr(slot_attention, "MAX_SCORES_BYTES", limit)
    sizes, softmax = [], torch.softmax

    def recorded(scores, **options):
        weights = softmax(scores, **options)
        if scores.ndim == 3:
            sizes.append(4 * scores.numel())
            assert torch.isfinite(weights).all(), "a padded query saw nothing"
        return weights

    monkeypatch.setattr(torch, "softmax", recorded)
    model = family_model(family)

    async def scenario():
        async with running(copy.deepcopy(model)) as engine:
            prompts = [[(7 * i + j * j) % 64 for j in range(40 + 4 * i)] for i in range(3)]
            calls = [
                # The slot in the middle is soon unused, but read with the others.
                engine.generate(p, Sampling(max_tokens=2 if i == 1 else 8), request_id=str(i))
                for i, p in enumerate(prompts)
            ]
            return list(zip(prompts, await asyncio.gather(*calls), strict=True))

    replies = asyncio.run(scenario())
    assert limit / 2 < max(sizes) <= limit
    assert max(deviation([model], *pair) for pair in replies) <= TOLERANCE


def test_a_bfloat16_model_stays_near_its_own_forward_pass():
    model = family_model("qwen3").to(torch.bfloat16)

    async def scenario():
        async with running(copy.deepcopy(model)) as engine:
            return await engine.generate([5, 6, 7, 8], Sampling(max_tokens=30), request_id="a")

    assert deviation([model], [5, 6, 7, 8], asyncio.run(scenario())) < 0.3


def refusal(model, *, context_length=CONTEXT_LENGTH):
    with pytest.raises(ValueError) as caught:
        EmbeddedEngine(model, max_concurrent=2, context_length=context_length)
    return str(caught.value)


def test_attention_sinks_are_refused():
    config = CONFIG_MAPPING["gpt_oss"](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    assert "'s_aux', which the embedded engine does not know" in refusal(model)
    assert model.config._attn_implementation == before


def test_layers_without_a_kv_cache_are_refused():
    model = family_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert "linear_attention" in refusal(model)


def test_attention_in_both_directions_is_refused():
    model = family_model("gemma3", use_bidirectional_attention=True)
    assert "from its own forward pass" in refusal(model)


def test_a_window_that_attention_is_not_told_about_is_refused():
    model = family_model("gemma3")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert f"sliding window {WINDOW}" in refusal(model)
    # As long as nothing is beyond the window, there is nothing to be told.
    EmbeddedEngine(model, max_concurrent=1, context_length=WINDOW)


def test_logits_changed_after_the_decoder_are_noticed():
    model = family_model("qwen3")
    forward = model.forward

    def halved(self, *args, past_key_values=None, **kwargs):
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits / 2
        return output

    model.forward = MethodType(halved, model)
    assert "from its own forward pass" in refusal(model)


def test_what_was_tried_out_leaves_the_model_as_it_was():
    model, untouched = family_model("gemma3"), family_model("gemma3")
    EmbeddedEngine(model, max_concurrent=1, context_length=64)
    for (name, parameter), other in zip(
        model.named_parameters(), untouched.parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name
