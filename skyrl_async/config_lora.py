"""The section of low-rank adapters, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field

from skyrl_async.config_section import Section, Texts


class LoraSection(Section):
    """Train low-rank adapters beside frozen weights instead of all weights; needs peft."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = Field(default=32, gt=0)
    """The adapters' part is multiplied by alpha / rank."""
    target_modules: Texts = ()
    """Names of the linear layers to adapt; empty for all of the decoder, without experts."""
    publish: Literal["merged", "adapter"] = "merged"
    """Send engines whole merged weights, or the adapters alone."""


_SERVED = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
"""Layers whose adapters SGLang can serve in the models that we know it with."""

_FUSED = (
    (("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
    (("gate_proj", "up_proj"), ("gate_proj",)),
)
"""Layers that SGLang computes at once, and which of them an adapter of any of them must have."""


def served_module_problems(modules: Iterable[str]) -> Iterator[str]:
    """Yield one line for each reason why SGLang cannot serve adapters of these layers.

    Args:
        modules: names of layers, or ends of names.
    """
    names = {name.rpartition(".")[2] for name in modules}
    unknown = sorted(names - _SERVED)
    remedy = "set lora.target_modules, or lora.publish=merged"
    if unknown:
        yield (
            f"SGLang serves no adapters of {', '.join(unknown)}, only of "
            f"{', '.join(sorted(_SERVED))}; {remedy}"
        )
    for together, needed in _FUSED:
        missing = [name for name in needed if name not in names]
        if missing and names.intersection(together):
            yield (
                f"SGLang computes {', '.join(together)} as one layer, and serves no adapter of it "
                f"without {', '.join(missing)}; {remedy}"
            )


def lora_problems(
    lora: LoraSection, *, engine_kind: str, weight_load: str, critic_kind: str
) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together.

    Args:
        lora: the section.
        engine_kind: of the run.
        weight_load: how servers are given weights.
        critic_kind: of the run.
    """
    if not lora.rank:
        if lora.publish == "adapter":
            yield "lora.publish=adapter: lora.rank=0 trains no adapter; set a rank, or merged"
        return
    if lora.publish == "adapter" and engine_kind == "sglang":
        for problem in served_module_problems(lora.target_modules):
            yield f"lora.publish=adapter, engine.kind=sglang: {problem}"
        if weight_load == "direct":
            yield (
                "lora.publish=adapter, engine.weight_load=direct: only whole weights can be sent "
                "into a server; set engine.weight_load=memory"
            )
    if critic_kind == "model":
        yield (
            f"critic.kind=model, lora.rank={lora.rank}: such a critic trains a whole decoder of "
            "its own, which LoRA is there to avoid; set critic.kind=head or lora.rank=0"
        )
