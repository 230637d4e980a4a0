"""Logprobs and entropy of target tokens from hidden states, without a matrix of all logits.

The matrix ``[L, V]`` of logits is made tile by tile, a block of words by a chunk of tokens, once in
the forward pass and again in the backward pass. In between, two numbers per token are kept: the
logarithm of the softmax's normalizer and the entropy, which are summed up block by block relative
to the largest logit so far (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax"). Blocks of words are the outer loop, so each block of the weight is read once, and each
block of its gradient is summed up in float32 and written once.

Shapes: ``L`` tokens, ``V`` vocabulary, ``H`` width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

TILE_BYTES = 64 * 2**20
"""Size of one tile of logits; two or three exist at a time."""

TILE_TOKENS = 4096
"""Tokens of a tile unless the caller says otherwise: with few, reading the weight takes longest."""

_LOWEST = -1e30


def head_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    float32: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return logprobs ``[L]`` of the targets and entropies ``[L]``, both with gradients.

    With ``z = hidden @ weight.T + bias``, capped as ``z = c tanh(z / c)`` if there is a ``softcap``
    c (Gemma 2), they are of ``softmax(z / temperature)``. Gradients go to ``hidden``, ``weight``
    and ``bias``. Results are float32, or float64 for float64 inputs.

    Args:
        hidden: ``[L, H]``; ``L = 0`` gives empty results that are still part of the graph.
        weight: ``[V, H]`` of the language-model head.
        targets: ``[L]`` int64; one outside ``0..V-1`` gives a logprob that is not a number.
        temperature: ``[L]``, positive, without gradient.
        bias: ``[V]`` of the head.
        softcap: bound of the logits' magnitude.
        chunk_tokens: tokens of a tile; the words of a tile follow from ``TILE_BYTES``. Peak memory
            beyond the gradients is a few tiles, whatever ``L`` and ``V`` are.
        float32: sum up products in float32 when the inputs are bfloat16 or float16; otherwise
            logits are rounded to the inputs' type, as a linear layer does.

    Raises:
        ValueError: if shapes or options do not fit, or the weight is a shard.
    """
    _check(hidden, weight, targets, temperature, bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}; give None for no cap")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    tiling = _Tiling.of(hidden, weight, chunk_tokens=chunk_tokens, softcap=softcap, float32=float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadOutputs.apply(hidden, weight, bias, targets, temperature, tiling)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, bias: Tensor | None
) -> None:
    if isinstance(weight, DTensor):
        raise ValueError(
            f"the head's weight is a shard ({weight.placements}); call head_outputs inside the "
            "forward pass of the module that owns it, where FSDP has gathered it"
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [L, H], [V, H]"
        )
    length, words = len(hidden), len(weight)
    for name, tensor, size in (
        ("targets", targets, length),
        ("temperature", temperature, length),
        ("bias", bias, words),
    ):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    """How logits are computed.

    Attributes:
        tokens: of a tile.
        words: of a tile.
        softcap: bound of the logits' magnitude, or None.
        narrow: type of the factors of matrix products.
        wide: type of everything else.
        fused: a product of narrow factors comes out wide, without rounding between.
    """

    tokens: int
    words: int
    softcap: float | None
    narrow: torch.dtype
    wide: torch.dtype
    fused: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        *,
        chunk_tokens: int | None,
        softcap: float | None,
        float32: bool,
    ) -> _Tiling:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        halves = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        fused = halves and float32 and hidden.is_cuda
        tokens = max(1, min(chunk_tokens or TILE_TOKENS, len(hidden)))
        words = max(1, TILE_BYTES // (tokens * wide.itemsize))
        return cls(
            tokens=tokens,
            words=min(words, len(weight)),
            softcap=softcap,
            narrow=hidden.dtype if fused or not float32 else wide,
            wide=wide,
            fused=fused,
        )

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of two matrices in the wide type."""
        a, b = a.to(self.narrow), b.to(self.narrow)
        if self.fused:
            return torch.mm(a, b, out_dtype=self.wide)
        return torch.mm(a, b).to(self.wide)

    def blocks(self, num_words: int) -> Iterator[slice]:
        """Yield the blocks of the vocabulary."""
        return _slices(num_words, self.words)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the chunks of the tokens."""
        return _slices(num_tokens, self.tokens)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a tile of logits, capped and not yet divided by the temperature."""
        z = self.multiply(hidden, weight.T)
        if bias is not None:
            z += bias
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _within(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return, as columns, where targets are in a block, and whether they are."""
    local = (targets - block.start).unsqueeze(1)
    inside = (local >= 0) & (local < block.stop - block.start)
    return torch.where(inside, local, 0), inside


class _HeadOutputs(torch.autograd.Function):
    """The two passes; see :func:`head_outputs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        tiling: _Tiling,
    ) -> tuple[Tensor, Tensor]:
        softmax = _OnlineSoftmax(targets, temperature.to(tiling.wide).unsqueeze(1))
        narrow = hidden.to(tiling.narrow)
        for block in tiling.blocks(len(weight)):
            part = weight[block].to(tiling.narrow)
            shift = None if bias is None else bias[block]
            for chunk in tiling.chunks(len(hidden)):
                softmax.add(tiling.logits(narrow[chunk], part, shift), chunk, block)
        logprobs, entropy, normalizer = softmax.results()
        ctx.tiling = tiling
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, normalizer, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> Any:
        hidden, weight, bias, targets, temperature, normalizer, entropy = ctx.saved_tensors
        tiling: _Tiling = ctx.tiling
        if by_logprob is None and by_entropy is None:
            return (None,) * 6
        by_token = _ByToken(by_logprob, by_entropy, targets, temperature, normalizer, entropy)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.zeros_like(hidden, dtype=tiling.wide)
        to_weight = torch.empty_like(weight) if needs_weight else None
        to_bias = torch.empty_like(bias) if needs_bias else None
        narrow = hidden.to(tiling.narrow)
        for block in tiling.blocks(len(weight)):
            part = weight[block].to(tiling.narrow)
            shift = None if bias is None else bias[block]
            block_sum = torch.zeros_like(part, dtype=tiling.wide) if needs_weight else None
            bias_sum = torch.zeros(len(part), dtype=tiling.wide, device=part.device)
            for chunk in tiling.chunks(len(hidden)):
                z = tiling.logits(narrow[chunk], part, shift)
                to_logits = by_token.gradient(z, chunk, block, softcap=tiling.softcap)
                if needs_hidden:
                    to_hidden[chunk] += tiling.multiply(to_logits, part)
                if block_sum is not None:
                    block_sum += tiling.multiply(to_logits.T, narrow[chunk])
                if to_bias is not None:
                    bias_sum += to_logits.sum(0)
            if to_weight is not None and block_sum is not None:
                to_weight[block] = block_sum
            if to_bias is not None:
                to_bias[block] = bias_sum
        grad_hidden = to_hidden.to(hidden.dtype) if needs_hidden else None
        return grad_hidden, to_weight, to_bias, None, None, None


class _OnlineSoftmax:
    """Sums over the vocabulary, block by block, relative to the largest logit so far.

    Args:
        targets: ``[L]``.
        temperature: ``[L, 1]``.
    """

    def __init__(self, targets: Tensor, temperature: Tensor) -> None:
        self._targets = targets
        self._temperature = temperature
        self._largest = torch.full_like(temperature, _LOWEST)
        self._sum = torch.zeros_like(temperature)
        self._weighted = torch.zeros_like(temperature)
        # A target that is in no block must not look like one.
        self._at_target = torch.full_like(temperature, torch.nan)

    def add(self, z: Tensor, chunk: slice, block: slice) -> None:
        """Take in a tile of logits, which is overwritten."""
        z.div_(self._temperature[chunk])
        local, inside = _within(self._targets[chunk], block)
        known = self._at_target[chunk]
        torch.where(inside, z.gather(1, local), known, out=known)
        before, total, weighted = self._largest[chunk], self._sum[chunk], self._weighted[chunk]
        largest = torch.maximum(before, z.amax(1, keepdim=True))
        drop = before - largest
        z.sub_(largest)
        e = z.exp()
        scale = drop.exp()
        # The mean of z - largest, times the sum: earlier words move down by the new maximum.
        product = torch.bmm(e.unsqueeze(1), z.unsqueeze(2))[:, 0]
        weighted.add_(total * drop).mul_(scale).add_(product)
        total.mul_(scale).add_(e.sum(1, keepdim=True))
        before.copy_(largest)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logprobs, entropies and logarithms of the normalizers, all ``[L]``."""
        log_sum = self._sum.log()
        normalizer = self._largest + log_sum
        logprobs = self._at_target - normalizer
        entropy = log_sum - self._weighted / self._sum
        return logprobs[:, 0], entropy[:, 0], normalizer[:, 0]


class _ByToken:
    """The gradient that arrives at each token, and what it needs to go on to the logits.

    With p = softmax(z) of z = logits / temperature, the gradient of the logprob of token y is
    ``1[j = y] - p_j`` and that of the entropy H is ``-p_j (log p_j + H)``.
    """

    def __init__(
        self,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        normalizer: Tensor,
        entropy: Tensor,
    ) -> None:
        self._by_logprob = _column(by_logprob, normalizer)
        self._by_entropy = by_entropy if by_entropy is None else by_entropy.unsqueeze(1)
        self._targets = targets
        self._temperature = temperature.to(normalizer.dtype).unsqueeze(1)
        self._normalizer = normalizer.unsqueeze(1)
        self._entropy = entropy.unsqueeze(1)

    def gradient(self, z: Tensor, chunk: slice, block: slice, *, softcap: float | None) -> Tensor:
        """Return the gradient to a tile of logits before the cap; ``z`` is overwritten."""
        slope = None if softcap is None else (z / softcap).square_().neg_().add_(1)
        temperature, by_logprob = self._temperature[chunk], self._by_logprob[chunk]
        z.div_(temperature).sub_(self._normalizer[chunk])
        if self._by_entropy is None:
            gradient = z.exp_().mul_(-by_logprob)
        else:
            gradient = z.exp()
            z.add_(self._entropy[chunk]).mul_(self._by_entropy[chunk]).add_(by_logprob)
            gradient.mul_(z).neg_()
        local, inside = _within(self._targets[chunk], block)
        gradient.scatter_add_(1, local, torch.where(inside, by_logprob, 0.0))
        gradient.div_(temperature)
        return gradient if slope is None else gradient.mul_(slope)


def _column(values: Tensor | None, like: Tensor) -> Tensor:
    return (torch.zeros_like(like) if values is None else values).unsqueeze(1)
