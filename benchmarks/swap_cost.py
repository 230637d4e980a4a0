"""What a weight swap costs an embedded engine, with the KV cache recomputed or kept.

The deviation is that of the engine's logprobs from a plain forward pass of each token's own
version, over the tokens sampled after the first swap.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from typing import Any

import torch
from running_engine import random_ids, running
from transformers import Qwen3ForCausalLM

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import Generation, Sampling

NUM_SWAPPING, SWAP_NEW_TOKENS, SWAP_EVERY_STEPS, NUM_SWAPS = 64, 48, 12, 3
UPDATE_SIZES = (0.001, 0.01, 0.1)
"""Norm of each swap's change over the norm of the parameter."""

MODES = ("recompute", "keep")
"""Of the KV cache."""


def versions_for_swaps(update_size: float) -> list[Qwen3ForCausalLM]:
    """Return a model whose logits are far from uniform, and one more for each swap.

    The matrices are drawn anew: a padding embedding of zeros would make the smallest change large.
    """
    model = build_tiny_model(hidden_size=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
        models = [model]
        for _ in range(NUM_SWAPS):
            models.append(copy.deepcopy(models[-1]))
            for parameter in models[-1].parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (update_size * parameter.norm() / noise.norm()))
    return models


async def swap_row(mode: Any, update_size: float) -> dict[str, Any]:
    """Generate through all swaps; return throughput, stall and deviation."""
    models = versions_for_swaps(update_size)
    rng = random.Random(0)
    prompts = [random_ids(rng, 8, vocab_size=64) for _ in range(NUM_SWAPPING)]
    sampling = Sampling(max_tokens=SWAP_NEW_TOKENS)
    async with running(
        copy.deepcopy(models[0]),
        max_concurrent=NUM_SWAPPING,
        context_length=64,
        kv_after_swap=mode,
    ) as engine:
        started = time.perf_counter()
        tasks = [
            asyncio.create_task(engine.generate(p, sampling, request_id=str(i)))
            for i, p in enumerate(prompts)
        ]
        for version in range(1, NUM_SWAPS + 1):
            # No reply ends before the last swap, so every step gives way exactly once.
            for _ in range(SWAP_EVERY_STEPS):
                await asyncio.sleep(0)
            weights = {n: p.detach().clone() for n, p in models[version].named_parameters()}
            await engine.load_weights(weights, policy_version=version)
        generations = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
        stats = engine.take_stats()
    deviations = after_swap_deviations(models, prompts, generations)
    return {
        "kv_after_swap": mode,
        "update_size": update_size,
        "logprob_deviation_mean": float(deviations.mean()),
        "logprob_deviation_max": float(deviations.max()),
        "reprefilled_tokens": stats.reprefilled_tokens,
        "stall_ms_per_swap": 1e3 * stats.swap_stall_s / stats.num_swaps,
        "tokens_per_s": NUM_SWAPPING * SWAP_NEW_TOKENS / seconds,
    }


@torch.inference_mode()
def after_swap_deviations(
    models: list[Qwen3ForCausalLM], prompts: list[list[int]], generations: list[Generation]
) -> torch.Tensor:
    """Return the absolute logprob differences of all tokens sampled after the first swap."""
    replies = torch.tensor([g.token_ids.tolist() for g in generations])
    versions = torch.tensor([g.policy_versions.tolist() for g in generations])
    logprobs = torch.tensor([g.logprobs.tolist() for g in generations])
    contexts = torch.cat([torch.tensor(prompts), replies], dim=1)
    parts = []
    for version in range(1, NUM_SWAPS + 1):
        logits = models[version](contexts).logits[:, len(prompts[0]) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(-1, replies.unsqueeze(-1)).squeeze(-1)
        parts.append((expected - logprobs)[versions == version].abs())
    return torch.cat(parts)
