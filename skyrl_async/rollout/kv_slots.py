"""A slot KV cache, and attention over it for one packed step of decoding and prefilling rows.

One forward pass carries the new tokens of all rows, packed as a batch of one without padding: one
token of each decoding row, several of each prefilling row. Only attention sees the rows apart. It
reads the keys and values of a row from its slot, which is a fixed row of a tensor
``[slots, kv_heads, length, head_dim]`` per layer, so nothing is moved when rows come and go.

The model is the unchanged `transformers` one: keys and values reach the slots through its ``Cache``
interface, attention through its ``AttentionInterface``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "skyrl_async_slots"
_PLAN_KEYWORD = "slot_plan"
_INITIAL_LENGTH = 64
_INITIAL_SLOTS = 16
_NEGATIVE_INFINITY = float("-inf")

IntArray = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """Rows with similar numbers of new tokens, which share one attention call.

    Attributes:
        tokens: range of the packed tokens ``[T]`` that belong to it.
        slots: the slots to read, a slice where they lie close together; ``R`` of them.
        query_length: ``Q``, new tokens per slot after padding.
        kv_length: ``L``, positions to read.
        gather: ``[R * Q]``, packed token (relative to ``tokens``) of each padded query, or None if
            that is the identity.
        scatter: ``[T]``, the padded query of each packed token.
        positions: ``[R, Q]``, of each padded query.
        masks: additive masks by numbers of key-value heads and of query heads for each of them.
    """

    tokens: slice
    slots: slice | Tensor
    query_length: int
    kv_length: int
    gather: Tensor | None
    scatter: Tensor
    positions: Tensor
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, kv_heads: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """Return 0 where a query may look and -inf elsewhere, ``[R * kv_heads, Q * repeats, L]``.

        Made once and shared by the layers.
        """
        mask = self.masks.get((kv_heads, repeats))
        if mask is None:
            columns = torch.arange(self.kv_length, device=self.positions.device)
            hidden = columns > self.positions.unsqueeze(-1)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask.masked_fill_(hidden, _NEGATIVE_INFINITY)
            mask = mask[:, None, :, None].expand(-1, kv_heads, -1, repeats, -1)
            mask = mask.reshape(-1, self.query_length * repeats, self.kv_length)
            self.masks[kv_heads, repeats] = mask
        return mask

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
        """Attend from packed queries ``[T, heads, D]`` to slots; return ``[T, heads, D_v]``.

        Plain matrix products: for the small matrices of a slot they are faster on a CPU than fused
        attention.
        """
        heads, kv_heads = query.shape[1], keys.shape[1]
        repeats, length = heads // kv_heads, self.query_length
        if isinstance(self.slots, slice):
            keys = keys[self.slots, :, : self.kv_length]
            values = values[self.slots, :, : self.kv_length]
        else:
            keys = keys[:, :, : self.kv_length].index_select(0, self.slots)
            values = values[:, :, : self.kv_length].index_select(0, self.slots)
        if self.gather is not None:
            query = query.index_select(0, self.gather)
        # All query heads of one key-value head attend together, which spares copies of the keys.
        query = query.view(-1, length, kv_heads, repeats, query.shape[2]).transpose(1, 2)
        query = query.reshape(-1, length * repeats, query.shape[4])
        mask = self.mask(kv_heads, repeats, query.dtype)
        scores = torch.baddbmm(mask, query, keys.flatten(0, 1).transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        out = torch.bmm(weights, values.flatten(0, 1))
        out = out.view(-1, kv_heads, length, repeats, out.shape[2]).transpose(1, 2)
        out = out.reshape(-1, heads, out.shape[4])
        return out if self.gather is None else out.index_select(0, self.scatter)


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """Where the packed tokens of one forward pass belong.

    Attributes:
        positions: ``[1, N]``, position ids of the packed tokens.
        last_tokens: ``[rows]``, index of the last packed token of each row.
        slots: ``[N]``, slot of each packed token.
        length_capacity: positions that a slot of the cache has.
        buckets: in the order of the tokens.
    """

    positions: Tensor
    last_tokens: IntArray
    slots: Tensor
    length_capacity: int
    buckets: list[_Bucket]
    num_attended: int = 0
    _writes: dict[int, Tensor] = field(default_factory=dict)

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
        buckets = []
        for first, last in _bucket_ranges(counts):
            part = slice(first, last)
            tokens = slice(int(ends[first] - counts[first]), int(ends[last - 1]))
            bucket = _make_bucket(
                slots[part], starts[part], counts[part], positions[tokens], tokens, device
            )
            buckets.append(bucket)
        self._plan = StepPlan(
            positions=torch.from_numpy(positions.copy()).unsqueeze(0).to(device),
            last_tokens=ends - 1,
            slots=torch.from_numpy(token_slots.copy()).to(device),
            length_capacity=self.length_capacity,
            buckets=buckets,
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
        for store in (*self._keys, *self._values):
            store[targets, :, :length] = store[sources, :, :length]

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


def _bucket_ranges(counts: IntArray) -> list[tuple[int, int]]:
    """Split ascending ``counts`` where padding to the largest would more than double the work."""
    first, last = int(counts[0]), int(counts[-1])
    if first == last:
        return [(0, len(counts))]
    ranges, start = [], 0
    while start < len(counts):
        smallest = int(counts[start])
        limit = 1 if smallest == 1 else 2 * smallest + 16
        end = int(np.searchsorted(counts, limit, side="right"))
        ranges.append((start, end))
        start = end
    return ranges


def _make_bucket(
    slots: IntArray,
    starts: IntArray,
    counts: IntArray,
    positions: IntArray,
    tokens: slice,
    device: torch.device,
) -> _Bucket:
    """Plan one attention call; ``positions`` are those of the tokens, the others of the rows."""
    low, length = int(slots.min()), int(counts[-1])
    span = int(slots.max()) - low + 1
    # Reading unused slots in between costs less than copying the used ones, if they are few.
    dense = 2 * span <= 3 * len(slots)
    num_rows = span if dense else len(slots)
    scatter = slots - low if dense else np.arange(len(slots))
    if length > 1:
        scatter = np.repeat(scatter * length - starts, counts) + positions
    identity = np.array_equal(scatter, np.arange(num_rows * length))
    padded_positions, gather = positions, None
    if not identity:
        gather = np.zeros(num_rows * length, np.int64)
        gather[scatter] = np.arange(len(scatter))
        padded_positions = np.zeros(num_rows * length, np.int64)
        padded_positions[scatter] = positions
    return _Bucket(
        tokens=tokens,
        slots=slice(low, low + span) if dense else torch.tensor(slots, device=device),
        query_length=length,
        kv_length=int(positions.max()) + 1,
        gather=None if gather is None else torch.from_numpy(gather).to(device),
        scatter=torch.from_numpy(scatter).to(device),
        positions=torch.tensor(padded_positions, device=device).view(num_rows, length),
    )


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
    packed = query[0].transpose(0, 1)
    scale = packed.shape[2] ** -0.5 if scaling is None else scaling
    parts = [b.attend(packed[b.tokens], key, value, scale=scale) for b in plan.buckets]
    plan.num_attended += 1
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def make_packed_forward(
    model: Any, cache: SlotCache
) -> Callable[[Tensor, StepPlan, Tensor], Tensor]:
    """Prepare ``model`` for packed forward passes against ``cache``.

    Plain forward passes of the model still work. The returned function takes token ids ``[1, N]``,
    the plan and the indices ``[n]`` of the tokens whose logits are wanted, and returns logits
    ``[n, vocab]``.

    Raises:
        ValueError: if the model cannot run this way; the message says why.
    """
    _check_model(model, cache.context_length)
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
        if plan.num_attended != model.config.num_hidden_layers:
            raise RuntimeError(
                f"{type(model).__name__} passed keyword arguments to {plan.num_attended} of "
                f"{model.config.num_hidden_layers} attention layers; the embedded engine needs all"
            )
        return output.logits[0]

    return forward


def _check_model(model: Any, context_length: int) -> None:
    name, config = type(model).__name__, model.config
    if not (model._supports_sdpa and model._supports_attention_backend):
        raise ValueError(
            f"{name} does not use transformers' attention interface with SDPA, which the embedded "
            "engine needs; take another model"
        )
    unsupported = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if unsupported:
        raise ValueError(f"{name} has layers without a KV cache: {sorted(unsupported)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context_length:
        raise ValueError(
            f"context_length {context_length} exceeds the sliding window {window} of {name}; "
            "lower context_length"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(
            f"context_length {context_length} exceeds the {limit} positions of {name}; lower it"
        )
