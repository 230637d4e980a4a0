"""Forward passes of an unchanged `transformers` model for a packed step against the slot cache.

Keys and values reach the slots through the library's ``Cache`` interface, attention through its
``AttentionInterface``. Whether a model really computes what its own forward pass computes is tried
out when an engine is made, so that one which does not is refused instead of sampling wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skyrl_async.rollout.kv_slots import SlotCache, StepPlan
from skyrl_async.rollout.slot_attention import AttentionKind, to_device

ATTENTION_NAME = "skyrl_async_slots"
PackedForward = Callable[[Tensor, StepPlan, Tensor], Tensor]

_PLAN_KEYWORD = "slot_plan"
_CHECK_LENGTHS = (9, 5)
"""Tokens of the two rows that a model is tried out with; each gets one more in a second step."""
_MAX_DEVIATION = {torch.float64: 1e-3, torch.float32: 1e-3}
_MAX_DEVIATION_ROUNDED = 0.2
"""Mean deviation of logprobs, in nats, beyond which a model is refused; types of 16 bits round."""


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from packed queries ``[1, heads, N, D]``; return ``[1, N, heads, D_v]``."""
    plan: StepPlan | None = kwargs.pop(_PLAN_KEYWORD, None)
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} attends with {unknown[0]!r}, which the embedded engine does "
            "not know; take another model or engine.kind=sglang"
        )
    kind = AttentionKind(
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        window=kwargs.get("sliding_window"),
    )
    return plan.attend(query[0].transpose(0, 1), key, value, kind).unsqueeze(0), None


def make_packed_forward(model: Any, cache: SlotCache) -> PackedForward:
    """Prepare ``model`` for packed forward passes against ``cache``.

    Plain forward passes of a model whose attention is SDPA's still work. The returned function
    takes token ids ``[1, N]``, the plan and the indices ``[n]`` of the tokens whose logits are
    wanted, and returns logits ``[n, vocab]``.

    Raises:
        ValueError: if the model cannot run this way; the message says why.
    """
    _check_model(model, cache.context_length)
    _check_forward(model, cache.context_length)
    return _packed_forward(model, cache)


def _packed_forward(model: Any, cache: SlotCache) -> PackedForward:
    AttentionInterface.register(ATTENTION_NAME, _slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    # A mask with four dimensions is passed through as it is; the plan makes the real ones.
    no_mask = torch.zeros((1, 1, 1, 1), device=model.device, dtype=model.dtype)

    def forward(token_ids: Tensor, plan: StepPlan, wanted: Tensor) -> Tensor:
        output = model(
            input_ids=token_ids,
            attention_mask=no_mask,
            position_ids=plan.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=wanted,
            **{_PLAN_KEYWORD: plan},
        )
        if len(plan.attended) != model.config.num_hidden_layers:
            raise ValueError(
                f"{type(model).__name__} passed keyword arguments to {len(plan.attended)} of "
                f"{model.config.num_hidden_layers} attention layers; the embedded engine needs all"
            )
        return output.logits[0]

    return forward


def _check_model(model: Any, context_length: int) -> None:
    name, config = type(model).__name__, model.config
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name} does not use transformers' attention interface, which the embedded engine "
            "needs; take another model or engine.kind=sglang"
        )
    unsupported = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if unsupported:
        raise ValueError(f"{name} has layers without a KV cache: {sorted(unsupported)}")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(
            f"context_length {context_length} exceeds the {limit} positions of {name}; lower it"
        )


@torch.inference_mode()
def _check_forward(model: Any, context_length: int) -> None:
    """Compare packed passes with plain ones: two rows of a prompt each, then one more token each.

    Raises:
        ValueError: if they differ, or the layers with a window do not say so.
    """
    lengths = [min(n, context_length - 1) for n in _CHECK_LENGTHS]
    vocab_size = model.get_output_embeddings().weight.shape[0]
    rows = [(np.arange(n + 1) * 7919 + 1) * (i + 1) % vocab_size for i, n in enumerate(lengths)]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        inputs = [to_device(row[None], model.device) for row in rows]
        plain = [model(input_ids=ids, use_cache=False).logits[0, -2:] for ids in inputs]
        cache = SlotCache(num_slots=2, context_length=context_length)
        packed, kinds = _two_steps(model, cache, rows, lengths)
    finally:
        model.set_attn_implementation(before)
    _check_windows(model, kinds, context_length)
    logprobs = [torch.log_softmax(torch.stack(x).float(), -1) for x in (plain, packed)]
    if not bool(torch.isfinite(logprobs[0]).all()):
        return
    deviation = float((logprobs[0] - logprobs[1]).abs().mean())
    limit = _MAX_DEVIATION.get(model.dtype, _MAX_DEVIATION_ROUNDED)
    if not deviation <= limit:
        raise ValueError(
            f"{type(model).__name__} deviates by {deviation:.3g} nats from its own forward pass in "
            f"the embedded engine, more than {limit}; take another model or engine.kind=sglang"
        )


def _two_steps(
    model: Any, cache: SlotCache, rows: list[Any], lengths: list[int]
) -> tuple[list[Tensor], list[AttentionKind]]:
    """Return for each row the logits of its last two tokens, and what the layers attended with."""
    forward, device = _packed_forward(model, cache), model.device
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    found: list[list[Tensor]] = [[] for _ in rows]
    plan = None
    for decoding in (False, True):
        steps = [(i, lengths[i] if decoding else 0, 1 if decoding else lengths[i]) for i in order]
        plan = cache.plan(steps, device=device)
        ids = np.concatenate([rows[i][start : start + count] for i, start, count in steps])
        wanted = to_device(plan.last_tokens, device)
        logits = forward(to_device(ids[None], device), plan, wanted)
        for place, i in enumerate(order):
            found[i].append(logits[place])
    assert plan is not None
    return [torch.stack(logits) for logits in found], plan.attended


def _check_windows(model: Any, kinds: list[AttentionKind], context_length: int) -> None:
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is None or window >= context_length:
        return
    expected = sum(_has_window(config))
    if sum(kind.window is not None for kind in kinds) < expected:
        raise ValueError(
            f"context_length {context_length} exceeds the sliding window {window} of "
            f"{type(model).__name__}, whose layers do not tell their attention about it; lower "
            "context_length"
        )


def _has_window(config: Any) -> Iterator[bool]:
    """Yield for each layer whether it has a window."""
    layer_types = getattr(config, "layer_types", None)
    for layer in range(config.num_hidden_layers):
        yield layer_types is None or layer_types[layer] == "sliding_attention"
