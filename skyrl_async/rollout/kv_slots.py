"""A slot KV cache for packed steps of decoding and prefilling rows.

One forward pass carries the new tokens of all rows, packed as a batch of one without padding: one
token of each decoding row, several of each prefilling row. Only attention sees the rows apart. It
reads the keys and values of a row from its slot, which is a fixed row of a tensor
``[slots, kv_heads, length, head_dim]`` per layer, so nothing is moved when rows come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skyrl_async.rollout.slot_attention import (
    AttentionKind,
    Bucket,
    IntArray,
    make_buckets,
    to_device,
)

_INITIAL_LENGTH = 64
_INITIAL_SLOTS = 16


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """Where the packed tokens of one forward pass belong.

    Attributes:
        positions: ``[1, N]``, position ids of the packed tokens.
        last_tokens: ``[rows]``, index of the last packed token of each row.
        slots: ``[N]``, slot of each packed token.
        length_capacity: positions that a slot of the cache has.
        buckets: in the order of the tokens.
        attended: what the layers attended with so far.
    """

    positions: Tensor
    last_tokens: IntArray
    slots: Tensor
    length_capacity: int
    buckets: list[Bucket]
    attended: list[AttentionKind] = field(default_factory=list)
    _writes: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
        """Attend from packed queries ``[N, heads, D]`` to slots; return ``[N, heads, D_v]``."""
        self.attended.append(kind)
        parts = [bucket.attend(query[bucket.tokens], keys, values, kind) for bucket in self.buckets]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write_index(self, kv_heads: int) -> Tensor:
        """Return ``[N * kv_heads]``: the row of a flattened cache tensor for each new key."""
        index = self._writes.get(kv_heads)
        if index is None:
            base = self.slots * (kv_heads * self.length_capacity) + self.positions[0]
            heads = torch.arange(kv_heads, device=base.device) * self.length_capacity
            index = self._writes[kv_heads] = (base.unsqueeze(1) + heads).flatten()
        return index


class SlotCache(Cache):
    """Keys and values of all slots; it grows in slots and in length as they are needed."""

    def __init__(self, *, num_slots: int, context_length: int) -> None:
        """Make an empty cache.

        Args:
            num_slots: most slots that it may grow to.
            context_length: most positions that a slot may grow to.
        """
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.context_length = context_length
        self.slot_capacity = min(_INITIAL_SLOTS, num_slots)
        self.length_capacity = min(_INITIAL_LENGTH, context_length)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._plan: StepPlan | None = None

    @property
    def size_bytes(self) -> int:
        """Memory of all slots."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def plan(self, rows: Sequence[tuple[int, int, int]], *, device: torch.device) -> StepPlan:
        """Make room for the new tokens of ``rows`` and say where they belong.

        Args:
            rows: slot, position of the first new token (everything before it is in the slot) and
                number of new tokens of each row; ascending in that number, no slot twice.
            device: of the model.
        """
        slots, starts, counts = np.array(rows, dtype=np.int64).T
        self._grow(slots=int(slots.max()) + 1, length=int((starts + counts).max()))
        ends = counts.cumsum()
        token_slots, positions = slots, starts
        if counts[-1] > 1:
            token_slots = np.repeat(slots, counts)
            positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        self._plan = StepPlan(
            positions=to_device(positions, device).unsqueeze(0),
            last_tokens=ends - 1,
            slots=to_device(token_slots, device),
            length_capacity=self.length_capacity,
            buckets=make_buckets(slots, starts, counts, positions, device=device),
        )
        return self._plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write packed keys ``[1, kv_heads, N, D]`` and values; return the layer's slots."""
        if self._plan is None:
            raise RuntimeError("SlotCache.update was called without a plan")
        if layer_idx == len(self._keys):
            for store, states in ((self._keys, key_states), (self._values, value_states)):
                shape = (self.slot_capacity, states.shape[1], self.length_capacity, states.shape[3])
                # Zeros, because attention multiplies masked positions by 0, and 0 * NaN is NaN.
                store.append(states.new_zeros(shape))
        index = self._plan.write_index(key_states.shape[1])
        for store, states in ((self._keys, key_states), (self._values, value_states)):
            flat = states[0].transpose(0, 1).reshape(-1, states.shape[3])
            store[layer_idx].view(-1, states.shape[3]).index_copy_(0, index, flat)
        return self._keys[layer_idx], self._values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0

    def copy_prefix(self, sources: list[int], targets: list[int], *, length: int) -> None:
        """Copy the first ``length`` positions of each source slot to the target beside it."""
        self._grow(slots=max(targets) + 1, length=length)
        if not self._keys:
            return
        device = self._keys[0].device
        read, write = (to_device(np.array(slots, np.int64), device) for slots in (sources, targets))
        for store in (*self._keys, *self._values):
            part = store[:, :, :length]
            part.index_copy_(0, write, part.index_select(0, read))

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold values that are not finite."""
        for store in (*self._keys, *self._values):
            store[slot].zero_()

    def _grow(self, *, slots: int, length: int) -> None:
        if slots <= self.slot_capacity and length <= self.length_capacity:
            return
        if slots > self.slot_capacity:
            self.slot_capacity = min(max(slots, 2 * self.slot_capacity), self.num_slots)
        if length > self.length_capacity:
            self.length_capacity = min(max(length, 2 * self.length_capacity), self.context_length)
        for stores in (self._keys, self._values):
            for layer, old in enumerate(stores):
                shape = (self.slot_capacity, old.shape[1], self.length_capacity, old.shape[3])
                new = old.new_zeros(shape)
                new[: old.shape[0], :, : old.shape[2]] = old
                stores[layer] = new
