"""What one forward pass of the learner needs, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from skyrl_async.learner.attention import TreeGeometry
from skyrl_async.learner.segments import SegmentGeometry

FLOAT_FIELDS = ("behavior_logprobs", "advantages", "temperature")
LONG_FIELDS = ("source", "targets", "index", "policy_versions", "prefix_versions")
"""Fields of a microbatch with one value per loss token."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass needs, as tensors.

    Attributes:
        token_ids: ``[N, R]`` int64.
        position_ids: ``[N, R]`` int64, counted from the start of each sequence.
        subtree_ends: ``[N, R]`` int64, index in the row after the last token that has this one in
            its context; after itself for a token that only sees itself, as padding does.
        source: ``[L]`` int64, index into ``N * R`` of the token *before* each loss token, whose
            logits predict it.
        targets: ``[L]`` int64, the loss tokens.
        index: ``[L]`` int64, their places among the loss tokens of all sequences, end to end in the
            order that the packer was told.
        behavior_logprobs: ``[L]``.
        advantages: ``[L]``.
        policy_versions: ``[L]`` int64.
        prefix_versions: ``[L]`` int64, the oldest version that sampled the token or one before it.
        temperature: ``[L]``.
        segments: where sequences lie in a flat row (the whole one, for a slice of it); None for
            tree rows.
    """

    token_ids: Tensor
    position_ids: Tensor
    subtree_ends: Tensor
    source: Tensor
    targets: Tensor
    index: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    policy_versions: Tensor
    prefix_versions: Tensor
    temperature: Tensor
    segments: SegmentGeometry | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> Microbatch:
        """Return the microbatch on a device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in values.items()}
        return Microbatch(**moved)

    def attention_mask(self) -> Tensor:
        """Return ``[N, 1, R, R]`` bool: from every token of tree rows to itself and its ancestors.

        Raises:
            ValueError: if the row is flat.
        """
        if self.segments is not None:
            raise ValueError("a flat row has no attention mask; call decoder_inputs()")
        index = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        causal = index <= index.unsqueeze(1)
        inside = index.unsqueeze(1) < self.subtree_ends.unsqueeze(1)
        return (causal & inside).unsqueeze(1)

    def decoder_inputs(self, *, sequence_group: Any = None) -> dict[str, Any]:
        """Return the arguments of a decoder that :func:`~.attention.use_attention` was told of.

        Args:
            sequence_group: process group whose ranks hold the slices of the row, in order.

        Raises:
            ValueError: if ranks are to share tree rows.
        """
        inputs: dict[str, Any] = {
            "input_ids": self.token_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
        }
        if self.segments is not None:
            # Of four dimensions, so that the model does not make a mask of its own; never read.
            mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.token_ids.device)
            return {
                **inputs,
                "attention_mask": mask,
                "geometry": self.segments,
                "sequence_group": sequence_group,
            }
        if sequence_group is not None:
            raise ValueError("ranks cannot share tree rows; pack with layout=flat")
        geometry = TreeGeometry(position_ids=self.position_ids)
        return {**inputs, "attention_mask": self.attention_mask(), "geometry": geometry}

    def slice_for_rank(self, rank: int, num_ranks: int) -> Microbatch:
        """Return the part of a flat row that one of the ranks computes that share it.

        The row is padded to a multiple of ``num_ranks``, each padding token by itself, and cut into
        equal slices. A loss token belongs to the rank that has the token before it, which may leave
        a rank without any.

        Raises:
            ValueError: if the rows are trees, or there is no such rank.
        """
        if self.segments is None:
            raise ValueError("ranks cannot share tree rows; pack with layout=flat")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        padding = -self.segments.num_tokens % num_ranks
        size = (self.segments.num_tokens + padding) // num_ranks
        start, stop = rank * size, (rank + 1) * size
        own = (self.source >= start) & (self.source < stop)
        of_loss = {name: getattr(self, name)[own] for name in (*LONG_FIELDS, *FLOAT_FIELDS)}
        of_loss["source"] -= start
        segments = self.segments
        if padding:
            lengths = [*segments.lengths(), *[1] * padding]
            segments = SegmentGeometry.of(lengths).to(self.token_ids.device)
        return Microbatch(
            token_ids=_padded(self.token_ids, padding)[:, start:stop],
            position_ids=_padded(self.position_ids, padding)[:, start:stop],
            subtree_ends=_padded(self.subtree_ends, padding)[:, start:stop],
            segments=segments,
            **of_loss,
        )


def empty_microbatch(
    *, dtype: torch.dtype = torch.float32, layout: Literal["tree", "flat"] = "tree"
) -> Microbatch:
    """Return one padding token and no loss token: for a rank that has nothing to do but take part.

    Args:
        dtype: of the floating-point tensors.
        layout: ``flat`` for ranks that share a row.
    """
    zero, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return Microbatch(
        token_ids=zero,
        position_ids=zero,
        subtree_ends=zero + 1,
        segments=SegmentGeometry.of([1]) if layout == "flat" else None,
        **dict.fromkeys(LONG_FIELDS, none),
        **{name: none.to(dtype) for name in FLOAT_FIELDS},
    )


def _padded(row: Tensor, padding: int) -> Tensor:
    return pad(row, (0, padding))
