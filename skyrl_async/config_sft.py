"""The section of supervised fine-tuning, and which other keys have a part in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field

from skyrl_async.config_section import Section


class SftSection(Section):
    """Supervised fine-tuning on demonstrations; for launchers/sft.py alone."""

    data: str | None = None
    """File of JSON lines, each with messages, or with prompt and completion."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the demonstrations."""
    examples_per_step: int = Field(default=32, ge=1)
    """Demonstrations in one optimizer step."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the demonstrations that is held out; their loss is logged."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What happens to demonstrations of more than engine.context_length tokens."""


KEYS_OF_SFT = (
    *("seed", "run.name", "run.dir", "run.resume", "run.max_seconds", "checkpoint.every_steps"),
    *("checkpoint.keep", "checkpoint.timeout_s", "model", "engine.context_length", "optimizer"),
    *("lora.rank", "lora.alpha", "lora.target_modules", "learner.num_ranks", "learner.num_threads"),
    *("learner.shard_ranks", "learner.sequence_ranks", "learner.device", "learner.compute_dtype"),
    *("learner.float32_head", "learner.attention", "learner.activation_checkpointing"),
    *("learner.offload", "learner.tokens_per_microbatch", "learner.step_timeout_s"),
    *("evaluation.every_steps", "logging", "sft"),
)
"""Keys, and sections with all of theirs, that supervised fine-tuning reads."""


def is_for_sft(key: str) -> bool:
    """Return whether supervised fine-tuning reads a key or a key of a section."""
    return any(key == known or key.startswith(f"{known}.") for known in KEYS_OF_SFT)


def idle_overrides(overrides: Iterable[str]) -> Iterator[str]:
    """Yield a line for each override that would change nothing.

    A file may have such keys, because the training that comes after it reads the same file.

    Args:
        overrides: ``key=value``.
    """
    for override in overrides:
        key = override.removeprefix("--").partition("=")[0].strip()
        if not is_for_sft(key):
            yield (
                f"{override}: {key} has no part in supervised fine-tuning; leave it out "
                "(--keys lists the keys that have)"
            )
