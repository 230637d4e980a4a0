"""Builds a rank's learner, and what it publishes, from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrl_async.config import Config
from skyrl_async.learner.attention import resolve_attention
from skyrl_async.learner.initial_weights import weight_reader
from skyrl_async.learner.learner import Learner
from skyrl_async.learner.lora import (
    adapter_parameters,
    add_adapter,
    fill_adapter,
    merged_parameters,
)
from skyrl_async.learner.lora_merge import MergedWeight
from skyrl_async.learner.policy import PolicySource, load_model, skeleton
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sharding import local_rows
from skyrl_async.learner.time_parts import Ledger
from skyrl_async.runtime.settings import (
    learner_settings,
    lora_settings,
    policy_source,
    teacher_source,
)
from skyrl_async.weight_sync.export_names import ExportNames, export_names
from skyrl_async.weight_sync.gathering import ShardedWeight
from skyrl_async.weight_sync.snapshot import NUM_BUFFERS, SnapshotPool, WeightSource


def build_ranks(config: Config, *, rank: int, store_address: tuple[str, int] | None) -> RankGroup:
    """Join the learner group."""
    learner = config.learner
    return RankGroup(
        rank=rank,
        num_ranks=learner.num_ranks,
        store_address=store_address,
        device=learner.device,
        timeout_s=learner.step_timeout_s,
        shard_ranks=learner.num_shard_ranks,
        sequence_ranks=learner.sequence_ranks,
    )


def build_learner(config: Config, ranks: RankGroup, *, ledger: Ledger) -> Learner:
    """Load this rank's part of the policy, and what else training needs.

    Raises:
        ValueError: if the model cannot be loaded, or the attention is not possible here.
    """
    settings, lora = learner_settings(config), lora_settings(config)
    source = policy_source(config)
    # Trained weights are in float32 whatever computes: bfloat16 loses small updates. Frozen ones
    # lose nothing by being in the type that they are computed in.
    frozen = replace(source, dtype=config.learner.compute_dtype)
    trained = replace(source, dtype="float32")
    model = _load(frozen if lora is not None else trained, ranks)
    if lora is not None:
        add_adapter(model, lora)
    reference = teacher = None
    if config.kl.coefficient and lora is None:
        reference = _load(trained, ranks)
    if config.distillation.teacher is not None:
        teacher = load_model(replace(teacher_source(config), dtype="float32"))
    attention = resolve_attention(
        config.learner.attention,
        device=ranks.device,
        dtype=getattr(torch, config.learner.compute_dtype),
        softcap=bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None)),
    )
    learner = Learner(
        model,
        replace(settings, attention=attention),
        reference=reference,
        teacher=teacher,
        ranks=ranks,
        ledger=ledger,
        fill=weight_reader(trained, ranks),
    )
    if lora is not None:
        fill_adapter(learner.model.named_parameters(), seed=config.seed)
    return learner


def _load(source: PolicySource, ranks: RankGroup) -> Any:
    """Return the model, without weights if every rank will read its own part of them."""
    if ranks.shard_ranks > 1 and source.path is not None:
        return skeleton(source)
    return load_model(source)


def whole_weights(config: Config, model: Any) -> SnapshotPool:
    """Return what copies the weights to publish, which this rank has all of."""
    num_buffers = NUM_BUFFERS + (config.lab.exact_lag or 0)
    if config.lora.rank and config.lora.publish == "adapter":
        return SnapshotPool(adapter_parameters(model), num_buffers=num_buffers)
    named: Iterator[tuple[str, Tensor | WeightSource]] = iter(merged_parameters(model))
    if config.engine.kind == "sglang":
        named = _exported(export_names(skeleton(policy_source(config))), named)
    dtype = getattr(torch, policy_source(config).dtype)
    return SnapshotPool(named, dtype=dtype, num_buffers=num_buffers)


def _exported(
    names: ExportNames, named: Iterator[tuple[str, Tensor | WeightSource]]
) -> Iterator[tuple[str, Tensor | WeightSource]]:
    """Publish under the names of Hugging Face files; weights with adapters have these already."""
    for name, weight in named:
        if isinstance(weight, Tensor):
            yield from names.published(name, weight)
        else:
            yield name, weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """This rank's rows of a sharded parameter, wherever FSDP has them when they are copied."""

    parameter: Tensor

    @property
    def base(self) -> Tensor:
        return local_rows(self.parameter)[0]

    def write_to(self, out: Tensor) -> None:
        out.copy_(self.base, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MergedRows:
    """This rank's rows of a sharded weight with its adapter, which every rank has all of."""

    weight: MergedWeight

    @property
    def base(self) -> Tensor:
        return local_rows(self.weight.base)[0]

    def write_to(self, out: Tensor) -> None:
        rows, first = local_rows(self.weight.base)
        lora_b = self.weight.lora_b[first : first + len(rows)]
        replace(self.weight, base=rows, lora_b=lora_b).write_to(out)


def sharded_weights(model: Any) -> list[ShardedWeight]:
    """Return this rank's rows of all weights to publish."""
    weights = []
    for name, weight in merged_parameters(model):
        whole = weight.base if isinstance(weight, MergedWeight) else weight
        rows: WeightSource = _Rows(parameter=whole)
        if isinstance(weight, MergedWeight):
            rows = _MergedRows(weight=weight)
        weights.append(
            ShardedWeight(
                name=name, shape=tuple(whole.shape), first_row=local_rows(whole)[1], rows=rows
            )
        )
    return weights


def export_of(config: Config) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]] | None:
    """Return how a whole parameter is published; None for as it is."""
    if config.engine.kind != "sglang":
        return None
    return export_names(skeleton(policy_source(config))).published


def save_whole_policy(learner: Learner, config: Config, ranks: RankGroup, folder: Path) -> None:
    """Write the policy in Hugging Face format, and an adapter beside it; all ranks call this."""
    from skyrl_async.learner.lora import plain_model, save_adapter
    from skyrl_async.learner.policy import load_tokenizer, save_policy

    if not learner.trainer.is_sharded and not config.lora.rank:
        if ranks.rank == 0:
            save_policy(learner.model, load_tokenizer(policy_source(config)), folder)
        return
    weights = {}
    for name, weight in merged_parameters(learner.model):
        whole = _gathered(weight)
        if ranks.rank == 0:
            weights[name] = whole
    if ranks.rank == 0:
        model = plain_model(learner.model, weights)
        save_policy(model, load_tokenizer(policy_source(config)), folder)
        if config.lora.rank:
            save_adapter(learner.model, folder / "adapter")


def _gathered(weight: Tensor | MergedWeight) -> Tensor:
    """Return a whole weight in host memory; of a sharded one, all ranks call this."""
    if isinstance(weight, MergedWeight):
        return replace(weight, base=_gathered(weight.base)).tensor()
    tensor: Any = weight.detach()
    if hasattr(tensor, "placements"):
        tensor = tensor.full_tensor()
    return tensor.cpu()
