"""One small model of each family, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

CONTEXT_LENGTH = 64
WINDOW = 7
"""Tokens that a layer with a window sees, the present one included."""

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": _WINDOWED,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": _WINDOWED, "query_pre_attn_scalar": 8},
    ),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""By name: the model type of `transformers`, and what its configuration has beside the sizes."""


def family_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a small model."""
    model_type, options = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**(_SIZES | options | changes))


def family_model(family: str, *, seed: int = 0, device: str = "cpu", **changes: Any) -> Any:
    """Return a small model in float32 whose weights depend on the arguments alone.

    They are large enough for every token of a context to matter. Attention is that of
    `transformers` in its plainest form, which all families support.
    """
    config = family_config(family, **changes)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        for parameter in model.parameters():
            # Norm weights are constant otherwise, which hides where they are left out.
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.data.copy_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
