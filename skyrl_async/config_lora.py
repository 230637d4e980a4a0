"""The section of low-rank adapters, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Send engines whole merged weights, or the adapters alone (embedded engines only)."""


def lora_problems(lora: LoraSection, *, engine_kind: str, critic_kind: str) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    if not lora.rank:
        if lora.publish == "adapter":
            yield "lora.publish=adapter: lora.rank=0 trains no adapter; set a rank, or merged"
        return
    if lora.publish == "adapter" and engine_kind == "sglang":
        yield (
            "lora.publish=adapter, engine.kind=sglang: adapters are not loaded into SGLang (on a "
            "CPU it cannot serve them at all); set lora.publish=merged or engine.kind=embedded"
        )
    if critic_kind == "model":
        yield (
            f"critic.kind=model, lora.rank={lora.rank}: such a critic trains a whole decoder of "
            "its own, which LoRA is there to avoid; set critic.kind=head or lora.rank=0"
        )
