"""Loading the policy: the built-in one, or any Hugging Face causal LM with its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_async.learner.tiny_policy import (
    BUILT_IN_VOCABULARY_SIZE,
    build_tiny_model,
    build_tiny_tokenizer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySource:
    """Where the policy comes from; the same source gives the same weights in every process.

    Attributes:
        path: folder or hub name of a causal LM; None makes the built-in policy from the rest.
        hidden_size: of the built-in policy.
        num_layers: of the built-in policy.
        num_heads: of the built-in policy.
        context_length: tokens that the built-in policy must be able to see.
        dtype: name of the torch type of the weights.
        seed: of the built-in policy's weights.
    """

    path: str | None = None
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    context_length: int = 4096
    dtype: str = "float32"
    seed: int = 0


def load_model(source: PolicySource) -> Any:
    """Return the model in evaluation mode (dropout would make its logprobs random).

    Raises:
        ValueError: if the folder holds no causal LM.
    """
    import torch

    dtype = getattr(torch, source.dtype)
    if source.path is None:
        model: Any = build_tiny_model(
            hidden_size=source.hidden_size,
            num_layers=source.num_layers,
            num_heads=source.num_heads,
            max_position_embeddings=source.context_length,
            seed=source.seed,
        )
        return model.to(dtype)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.path={source.path}: not a Hugging Face causal LM ({error}); give a folder with "
            "config.json and safetensors, or a hub name"
        ) from error
    return model.eval()


def skeleton(source: PolicySource) -> Any:
    """Return the model without weights: names, types and shapes of its parameters, tied as in it.

    Its buffers, which no file holds, have their values. The built-in policy has its weights.

    Raises:
        ValueError: if the folder holds no causal LM.
    """
    import torch

    if source.path is None:
        return load_model(source)
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.path={source.path}: not a Hugging Face causal LM ({error})"
        ) from error
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, source.dtype))
    model.tie_weights()
    return model.eval()


def vocabulary_size(source: PolicySource) -> int:
    """Return how many token ids the policy has; larger ones cannot be embedded."""
    if source.path is None:
        return BUILT_IN_VOCABULARY_SIZE
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(source.path).get_text_config().vocab_size)


def load_tokenizer(source: PolicySource) -> Any:
    """Return the tokenizer of the policy.

    Raises:
        ValueError: if the folder holds no tokenizer, or one without a stop token.
    """
    if source.path is None:
        return build_tiny_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={source.path}: no tokenizer there ({error}); save one beside the model"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path={source.path}: its tokenizer has no eos_token to stop at")
    return tokenizer


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format (safetensors), complete or not at all."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
