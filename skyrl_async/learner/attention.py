"""Attention over packed rows, as a function that ``transformers`` calls in every layer.

::

    kind = resolve_attention("auto", device=device, dtype=dtype)
    use_attention(model, kind)
    decoder(**microbatch.decoder_inputs())

Flat rows (:class:`~skyrl_async.learner.segments.SegmentGeometry`) go to a kernel for segments:
``flash`` is flash-attn's, ``varlen`` is PyTorch's, both on GPUs in 16 bits; ``sdpa`` runs on any
device, as one batched call for all segments of about one length. Padding at the end of a causal
segment changes nothing before it. Tree rows bring a mask and take PyTorch's masked attention with
any kind, and a call with neither is what ``transformers`` does by itself.

Shapes: ``B`` rows, ``A`` query heads, ``G`` key-value heads, ``T`` tokens, ``D`` width of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skyrl_async.learner.segments import Bucket, SegmentGeometry
from skyrl_async.learner.sequence_parallel import gather_heads, gather_tokens

AttentionKind = Literal["flash", "varlen", "sdpa"]

_NAMES: dict[AttentionKind, str] = {
    # The word "flash" in a name would make transformers load a kernel of its own.
    "flash": "packed_fa",
    "varlen": "packed_varlen",
    "sdpa": "packed",
}
_HALVES = (torch.bfloat16, torch.float16)
_MIN_WINDOW_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeGeometry:
    """Marks rows whose mask says which tokens are ancestors, ``[B, 1, T, T]``.

    Attributes:
        position_ids: ``[B, T]``; differences along a path are distances, which bound windows.
    """

    position_ids: Tensor


def resolve_attention(
    requested: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    softcap: bool = False,
) -> AttentionKind:
    """Return the kind of attention to use; ``auto`` takes the first possible of the three.

    Args:
        requested: ``auto``, ``flash``, ``varlen`` or ``sdpa``.
        device: of the model.
        dtype: in which attention is computed.
        softcap: whether the model caps attention logits (Gemma 2).

    Raises:
        ValueError: if the request is unknown or not possible here.
    """
    if requested != "auto" and requested not in get_args(AttentionKind):
        raise ValueError(
            f"learner.attention={requested}: must be auto, {', '.join(get_args(AttentionKind))}"
        )
    for kind in get_args(AttentionKind):
        obstacle = _obstacle(kind, torch.device(device), dtype, softcap=softcap)
        if requested == kind and obstacle is not None:
            raise ValueError(
                f"learner.attention={requested}: {obstacle}; use learner.attention=auto or sdpa"
            )
        if requested in ("auto", kind) and obstacle is None:
            return kind
    raise AssertionError("sdpa is always possible")


def _obstacle(
    kind: AttentionKind, device: torch.device, dtype: torch.dtype, *, softcap: bool
) -> str | None:
    """Return why a kind is not possible, or None."""
    if kind == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and the model is on {device}"
    if dtype not in _HALVES:
        return f"it needs bfloat16 or float16, and the model computes in {dtype}"
    if kind == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
    elif softcap:
        return "it cannot cap attention logits, as the model asks for"
    elif (missing := _missing_in_torch()) is not None:
        return missing
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, and {device} has less"
    return None


def _missing_in_torch() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    needed = {"enable_gqa", "window_size", "scale"}
    missing = needed - set(inspect.signature(varlen_attn).parameters)
    names = ", ".join(sorted(missing))
    return f"varlen_attn of PyTorch {torch.__version__} lacks {names}" if missing else None


def use_attention(model: Any, kind: AttentionKind) -> None:
    """Make all layers of ``model`` (a ``transformers`` model) compute attention with ``kind``.

    Calls without packed rows, such as generation, stay what they are.

    Raises:
        ValueError: if the model has layers that would mix the sequences of a row.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    other = sorted(layer_types - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(
            f"model type {config.model_type} has layers of {', '.join(other)}, which cannot tell "
            "the sequences of a packed row apart; use a model with full or sliding attention"
        )
    if any(getattr(module, "sinks", None) is not None for module in model.modules()):
        raise ValueError(
            f"model type {config.model_type} has attention sinks, which packed attention lacks"
        )
    name = _NAMES[kind]
    AttentionInterface.register(name, partial(packed_attention, kind=kind))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    if config._attn_implementation != name:
        raise ValueError(
            f"model type {config.model_type} does not let its attention be exchanged; use a model "
            "that computes attention through transformers' AttentionInterface"
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kind: AttentionKind,
    geometry: SegmentGeometry | TreeGeometry | None = None,
    sequence_group: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return ``[B, T, A, D]``; what ``transformers`` calls in place of its own functions.

    Args:
        module: the layer.
        query: ``[B, A, T, D]``.
        key: ``[B, G, T, D]``.
        value: ``[B, G, T, D]``.
        attention_mask: ``[B, 1, T, T]`` bool of tree rows.
        kind: of the kernel for flat rows.
        geometry: of packed rows; None for ordinary ones.
        sequence_group: ranks that hold consecutive slices of the flat row; then ``T`` is a slice.
        scaling: of the logits; ``D ** -0.5`` if None.
        softcap: logits z become ``c tanh(z / c)``.
        sliding_window: a token sees at most so many, itself included.
        dropout: must be 0 for packed rows.
        kwargs: for ordinary rows.

    Raises:
        ValueError: if packed rows are called with dropout.
    """
    if geometry is None:
        return _unpacked(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            softcap=softcap,
            **kwargs,
        )
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} of the model: packed rows need 0 (eval mode)"
        )
    rules = Rules(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    if isinstance(geometry, TreeGeometry):
        assert attention_mask is not None, "tree rows come with their mask"
        mask = _banded(attention_mask, geometry.position_ids, sliding_window)
        return _attend(query, key, value, rules, mask=mask).transpose(1, 2), None
    attend = partial(_KERNELS[kind], geometry=geometry, rules=rules)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is None:
        return attend(q, k, v).unsqueeze(0), None
    q, k, v = gather_tokens(q, k, v, group=sequence_group)
    return gather_heads(attend(q, k, v), group=sequence_group).unsqueeze(0), None


def _unpacked(module: Any, *tensors: Any, softcap: float | None, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *tensors, softcap=softcap, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a model asks of attention.

    Attributes:
        scaling: of the logits.
        softcap: bound of their magnitude, or None.
        window: tokens that a token sees, itself included, or None for all before it.
    """

    scaling: float
    softcap: float | None
    window: int | None


def _flash(q: Tensor, k: Tensor, v: Tensor, *, geometry: SegmentGeometry, rules: Rules) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        geometry.cu_seqlens,
        geometry.cu_seqlens,
        geometry.max_segment,
        geometry.max_segment,
        softmax_scale=rules.scaling,
        causal=True,
        window_size=_window(rules),
        softcap=rules.softcap or 0.0,
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, *, geometry: SegmentGeometry, rules: Rules) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if rules.softcap is not None:
        raise ValueError("varlen attention cannot cap logits; use learner.attention=flash or sdpa")
    attended = varlen_attn(
        q,
        k,
        v,
        geometry.cu_seqlens,
        geometry.cu_seqlens,
        geometry.max_segment,
        geometry.max_segment,
        scale=rules.scaling,
        window_size=_window(rules),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, Tensor), "nothing else was asked for"
    return attended


def _window(rules: Rules) -> tuple[int, int]:
    """Return how many tokens before and after itself a token sees; -1 is all."""
    return (-1 if rules.window is None else rules.window - 1, 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, geometry: SegmentGeometry, rules: Rules) -> Tensor:
    """Attend within the segments of ``[T, A, D]`` and ``[T, G, D]``, bucket by bucket."""
    outputs = []
    for bucket in geometry.buckets:
        batch = [_take(x, bucket).transpose(1, 2) for x in (q, k, v)]
        attended = _causal(*batch, rules=rules).transpose(1, 2)
        outputs.append(attended.reshape(-1, *attended.shape[2:]))
    return torch.cat(outputs).index_select(0, geometry.inverse)


def _take(x: Tensor, bucket: Bucket) -> Tensor:
    """Return ``[n, P, heads, D]``: the segments of a bucket."""
    if bucket.start is not None:
        return x.narrow(0, bucket.start, bucket.num_tokens).unsqueeze(0)
    taken = x.index_select(0, bucket.index.reshape(-1))
    return taken.view(*bucket.index.shape, *x.shape[1:])


def _causal(q: Tensor, k: Tensor, v: Tensor, *, rules: Rules) -> Tensor:
    """Return causal attention ``[n, A, P, D]`` within each of ``n`` sequences of ``P`` tokens."""
    length = q.shape[2]
    if rules.window is None or rules.window >= length:
        return _attend(q, k, v, rules, mask=None)
    size = max(rules.window, _MIN_WINDOW_BLOCK)
    outputs = []
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(0, start - rules.window + 1)
        ages = _places(start, stop, q).unsqueeze(1) - _places(first, stop, q)
        mask = (ages >= 0) & (ages < rules.window)
        queries, keys, values = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        outputs.append(_attend(queries, keys, values, rules, mask=mask))
    return torch.cat(outputs, dim=2)


def _places(start: int, stop: int, like: Tensor) -> Tensor:
    return torch.arange(start, stop, device=like.device)


def _banded(mask: Tensor, position_ids: Tensor, window: int | None) -> Tensor:
    """Return a tree's mask without ancestors that are out of the window."""
    if window is None or window >= mask.shape[-1]:
        return mask
    ages = position_ids.unsqueeze(2) - position_ids.unsqueeze(1)
    return mask & (ages < window).unsqueeze(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, rules: Rules, *, mask: Tensor | None) -> Tensor:
    """Return ``[B, A, T, D]``: attention under a mask, or causal without one."""
    if rules.softcap is not None:
        return _capped(q, k, v, rules, mask=mask)
    if mask is not None:
        # With a mask, heads that share keys would fall back to a kernel that stores all logits.
        k, v = _repeated(k, q), _repeated(v, q)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=rules.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _repeated(x: Tensor, like: Tensor) -> Tensor:
    """Return key-value heads repeated for each of the query heads."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1)


def _capped(q: Tensor, k: Tensor, v: Tensor, rules: Rules, *, mask: Tensor | None) -> Tensor:
    """Return attention with capped logits, which no kernel of PyTorch's has.

    Gemma 2: z = c tanh(q k / (c sqrt(d))), softmax in float32 at least.
    """
    assert rules.softcap is not None
    k, v = _repeated(k, q), _repeated(v, q)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    logits = rules.softcap * torch.tanh(q @ k.transpose(2, 3) * (rules.scaling / rules.softcap))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = logits.to(wide).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.to(q.dtype) @ v


_KERNELS: dict[AttentionKind, Callable[..., Tensor]] = {
    "flash": _flash,
    "varlen": _varlen,
    "sdpa": _sdpa,
}
