"""Corrections composed: which weight and which masks, and what they make of every token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from skyrl_async.algorithms import kl
from skyrl_async.algorithms.behavior_losses import m2_mask
from skyrl_async.algorithms.corrections import (
    RejectionLevel,
    WeightKind,
    geometric_mask,
    geometric_weights,
    k2_mask,
    k3_mask,
    normalize_weights,
    opsm_mask,
    sequence_mask,
    sequence_weights,
    token_mask,
    token_weights,
    veto_mask,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings:
    """Which weight and which masks to apply; a mask that is None rejects nothing.

    Attributes:
        weight: over what the importance weight is taken.
        weight_cap: truncation of the weight from above.
        normalize_weights: divide the weights of kept tokens by their mean.
        token_mask: lowest and highest ratio of a token.
        sequence_mask: lowest and highest product of ratios of a sequence.
        geometric_mask: lowest and highest geometric mean of ratios of a sequence.
        veto_below: a token's ratio below this rejects its sequence.
        k2_limit: largest K2 divergence.
        k3_limit: largest K3 divergence.
        k_level: of what the two divergences are taken.
        opsm_delta: largest drift, in nats per token, of a sequence of negative advantage.
        m2_limit: largest second moment of log ratios, as ``m2_mask`` takes it, over the tokens that
            the other masks keep.
    """

    weight: WeightKind = "token"
    weight_cap: float = 2.0
    normalize_weights: bool = False
    token_mask: tuple[float, float] | None = None
    sequence_mask: tuple[float, float] | None = None
    geometric_mask: tuple[float, float] | None = None
    veto_below: float | None = None
    k2_limit: float | None = None
    k3_limit: float | None = None
    k_level: RejectionLevel = "token"
    opsm_delta: float | None = None
    m2_limit: float | None = None

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def reads_advantages(self) -> bool:
        """Whether a mask depends on the signs of the advantages."""
        return self.opsm_delta is not None or self.m2_limit is not None

    @property
    def needs_whole_batch(self) -> bool:
        """Whether any token's part depends on tokens of other sequences.

        Masks do: denominators count what they keep.
        """
        masks = (
            *(self.token_mask, self.sequence_mask, self.geometric_mask, self.veto_below),
            *(self.k2_limit, self.k3_limit, self.opsm_delta, self.m2_limit),
        )
        return self.normalize_weights or any(mask is not None for mask in masks)

    def _problems(self) -> Iterator[str]:
        for name, choice, choices in (
            ("weight", self.weight, get_args(WeightKind)),
            ("k_level", self.k_level, get_args(RejectionLevel)),
        ):
            if choice not in choices:
                yield f"{name}={choice!r}: set one of {', '.join(choices)}"
        if not self.weight_cap >= 1:
            yield (
                f"weight_cap={self.weight_cap}: must be at least 1, or even on-policy tokens would "
                "lose weight; set for example 2"
            )
        for name, interval in (
            ("token_mask", self.token_mask),
            ("sequence_mask", self.sequence_mask),
            ("geometric_mask", self.geometric_mask),
        ):
            if interval is None:
                continue
            if len(interval) != 2 or not 0 <= interval[0] <= 1 <= interval[1]:
                yield (
                    f"{name}={interval}: must be two numbers with 0 <= low <= 1 <= high, or "
                    "on-policy tokens would be rejected; set for example (0.5, 2)"
                )
        if self.veto_below is not None and not 0 < self.veto_below < 1:
            yield f"veto_below={self.veto_below}: must be between 0 and 1; set for example 1e-4"
        for name, limit in (
            ("k2_limit", self.k2_limit),
            ("k3_limit", self.k3_limit),
            ("m2_limit", self.m2_limit),
        ):
            if limit is not None and not limit > 0:
                yield f"{name}={limit}: must be above 0; raise it, or set None for no limit"
        if self.opsm_delta is not None and not self.opsm_delta >= 0:
            yield f"opsm_delta={self.opsm_delta}: must be at least 0; set for example 0.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Weight and mask of every token; no gradient.

    Attributes:
        weights: ``[T]``; 0 where masked.
        raw_weights: ``[T]``, before truncation, normalization and masks; 0 without a valid ratio.
        mask: ``[T]`` bool, true where kept.
        sums: quantities of tokens, summed over ``T``. ``masked_...`` counts what that mask rejects
            by itself; ``importance_weight`` and its square are over kept tokens, truncated but not
            normalized; ``kl_behavior`` (K3) is over all tokens with a finite log ratio.
    """

    weights: Tensor
    raw_weights: Tensor
    mask: Tensor
    sums: dict[str, Tensor]


def correct(
    log_ratios: Tensor,
    *,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    settings: CorrectionSettings,
) -> Correction:
    """Return weights and mask of every token; a token is kept if all masks keep it.

    A token whose log ratio is not finite is rejected first and has no part in any product, mean or
    sum. The second moment is limited last, over the tokens that the other masks keep, so that the
    limit holds for what is trained on; weights are normalized over what is kept in the end.

    Args:
        log_ratios: ``[T]``; give NaN where ``finite_mask`` is false.
        advantages: ``[T]``.
        sequence_ids: ``[T]``, the sequence i(t) of each token.
        num_sequences: S.
        settings: what to apply; where its ``needs_whole_batch`` holds, the tokens must be those of
            the whole minibatch, of all ranks.

    Source: the functions that ``settings`` names, composed.
    """
    finite = log_ratios.isfinite()
    valid = _places(finite)
    ratios, ids = _take(log_ratios.detach(), valid), _take(sequence_ids, valid)
    masks = _masks(ratios, _take(advantages, valid), ids, num_sequences, settings)
    kept = _all_of(masks, like=ratios)
    raw = _raw_weights(ratios, ids, num_sequences, settings.weight)
    truncated = torch.where(kept, raw.clamp(max=settings.weight_cap), 0.0)
    counts = {
        "kept": kept,
        "masked_invalid": ~finite,
        **{f"masked_{name}": ~mask for name, mask in masks.items()},
        "importance_weight_capped": (raw > settings.weight_cap) & kept,
    }
    sums = {name: chosen.count_nonzero().to(ratios.dtype) for name, chosen in counts.items()} | {
        "importance_weight": truncated.sum(),
        "importance_weight_squared": truncated.square().sum(),
        "kl_behavior": kl.k3(-ratios).sum(),
    }
    if settings.normalize_weights:
        inside = _places(kept)
        truncated = _put(normalize_weights(_take(truncated, inside)), inside, len(ratios))
    return Correction(
        weights=_put(truncated, valid, len(finite)),
        raw_weights=_put(raw, valid, len(finite)),
        mask=_put(kept, valid, len(finite)),
        sums=sums,
    )


def _masks(
    log_ratios: Tensor, advantages: Tensor, ids: Tensor, size: int, settings: CorrectionSettings
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    if settings.token_mask is not None:
        low, high = settings.token_mask
        masks["token"] = token_mask(log_ratios, low=low, high=high)
    if settings.sequence_mask is not None:
        low, high = settings.sequence_mask
        masks["sequence"] = sequence_mask(log_ratios, ids, size, low=low, high=high)
    if settings.geometric_mask is not None:
        low, high = settings.geometric_mask
        masks["geometric"] = geometric_mask(log_ratios, ids, size, low=low, high=high)
    if settings.veto_below is not None:
        masks["veto"] = veto_mask(log_ratios, ids, size, below=settings.veto_below)
    level = settings.k_level
    if settings.k2_limit is not None:
        masks["k2"] = k2_mask(log_ratios, ids, size, limit=settings.k2_limit, level=level)
    if settings.k3_limit is not None:
        masks["k3"] = k3_mask(log_ratios, ids, size, limit=settings.k3_limit, level=level)
    if settings.opsm_delta is not None:
        masks["opsm"] = opsm_mask(log_ratios, advantages, ids, size, delta=settings.opsm_delta)
    if settings.m2_limit is not None:
        inside = _places(_all_of(masks, like=log_ratios))
        small = m2_mask(
            _take(log_ratios, inside), _take(advantages, inside), limit=settings.m2_limit
        )
        masks["m2"] = ~_put(~small, inside, len(log_ratios))
    return masks


def _all_of(masks: dict[str, Tensor], *, like: Tensor) -> Tensor:
    kept = torch.ones_like(like, dtype=torch.bool)
    for mask in masks.values():
        kept = kept & mask
    return kept


def _raw_weights(log_ratios: Tensor, ids: Tensor, size: int, kind: WeightKind) -> Tensor:
    match kind:
        case "none":
            return torch.ones_like(log_ratios)
        case "token":
            return token_weights(log_ratios, cap=math.inf)
        case "sequence":
            return sequence_weights(log_ratios, ids, size, cap=math.inf)
        case "geometric":
            return geometric_weights(log_ratios, ids, size, cap=math.inf)


def _places(where: Tensor) -> Tensor | None:
    """Return the places where ``where [T]`` is true, or None for all: then nothing is copied."""
    return None if where.all() else where.nonzero().squeeze(-1)


def _take(values: Tensor, places: Tensor | None) -> Tensor:
    """Return the values at some places."""
    return values if places is None else values.index_select(0, places)


def _put(values: Tensor, places: Tensor | None, size: int) -> Tensor:
    """Return ``[size]`` with the values at some places, and zero elsewhere."""
    if places is None:
        return values
    return values.new_zeros(size).index_copy(0, places, values)
