"""Packed rows give what each sequence gives alone, in the architectures that are supported."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from skyrl_async.learner import attention
from skyrl_async.learner.attention import use_attention
from skyrl_async.learner.logprobs import token_outputs
from skyrl_async.learner.packing import pack
from skyrl_async.types import TrainSequence
from tests.learner.test_packing import sequences_of

F64, F32 = torch.float64, torch.float32
WINDOW = 12
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "gemma": partial(GemmaConfig, num_key_value_heads=1),
    "gemma3": partial(
        Gemma3TextConfig, sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=16
    ),
    "qwen3_moe": partial(
        Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mistral": partial(MistralConfig, sliding_window=WINDOW),
    "gemma2": partial(
        Gemma2Config,
        sliding_window=WINDOW,
        layer_types=MIXED,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
}


IN_32_BITS = {"qwen3_moe": 1e-8, "gemma2": 1e-6}
"""Tolerances where the router, or the reference's attention, has a softmax in 32 bits."""


def build(name: str, dtype: torch.dtype) -> nn.Module:
    config = CONFIGS[name](**{**SIZES, **getattr(CONFIGS[name], "keywords", {})})
    torch.manual_seed(0)
    # Gemma 2 caps logits, which only this implementation does, with a softmax in 32 bits.
    kind = "eager" if name == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kind).to(dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    if dtype == F64:
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = partial(norm_in_64_bits, module)
    return model


def norm_in_64_bits(module: nn.Module, x: Tensor) -> Tensor:
    """The models' norms compute in 32 bits, which would hide what is tested."""
    eps = getattr(module, "variance_epsilon", None) or module.eps
    shift = 1 if type(module).__name__.startswith("Gemma") else 0
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (shift + module.weight)


def sequences() -> list[TrainSequence]:
    """Three replies to one prompt, one longer than several windows, and the shortest possible."""
    rng = np.random.default_rng(0)

    def words(number: int) -> list[int]:
        return rng.integers(1, 64, number).tolist()

    prompt = words(20)
    members = [(prompt, words(n)) for n in (5, 30, 9)]
    return sequences_of(
        *members, (words(60), words(50)), (words(1), words(1)), (words(3), words(4))
    )


def alone(model: nn.Module, members: list[TrainSequence]) -> Tensor:
    """Return the logprobs of the loss tokens, by plain forward passes."""
    logprobs = []
    for s in members:
        ids = torch.from_numpy(s.token_ids.astype(np.int64))
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        every = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        logprobs.append(every[torch.tensor(s.loss_mask[1:])])
    return torch.cat(logprobs)


def packed(
    model: nn.Module, members: list[TrainSequence], layout: str, dtype: torch.dtype
) -> Tensor:
    microbatches = pack(members, tokens_per_microbatch=128, layout=layout, dtype=dtype)
    assert all((m.segments is None) == (layout == "tree") for m in microbatches)
    logprobs = [token_outputs(model, m).logprobs for m in microbatches]
    return torch.cat(logprobs)[torch.cat([m.index for m in microbatches]).argsort()]


def gradients(model: nn.Module, logprobs: Tensor) -> list[Tensor]:
    share = torch.cos(torch.arange(len(logprobs), dtype=logprobs.dtype))
    return list(torch.autograd.grad((logprobs * share).sum(), list(model.parameters())))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_and_gradients_of_packed_rows_are_those_of_each_sequence_alone(
    name, dtype, tolerance, monkeypatch
):
    if dtype == F64:
        tolerance = IN_32_BITS.get(name, tolerance)
    monkeypatch.setattr(attention, "_MIN_WINDOW_BLOCK", 8)
    model, members = build(name, dtype), sequences()
    wanted = alone(model, members)
    wanted_gradients = gradients(model, wanted)
    scale = max(1.0, *(float(g.abs().max()) for g in wanted_gradients))
    use_attention(model, "sdpa")
    for layout in ("flat", "tree"):
        got = packed(model, members, layout, dtype)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        for a, b in zip(gradients(model, got), wanted_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def test_checkpointed_layers_get_the_geometry_again():
    model, members = build("gemma3", F64), sequences()
    use_attention(model, "sdpa")
    wanted = gradients(model, packed(model, members, "flat", F64))
    model.activation_checkpointing_enable()
    model.train()
    for a, b in zip(gradients(model, packed(model, members, "flat", F64)), wanted, strict=True):
        assert torch.equal(a, b)
