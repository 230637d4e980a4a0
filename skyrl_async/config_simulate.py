"""The section of simulated engines and learners, to try a cluster's shape without its GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from skyrl_async.config_section import Section
from skyrl_async.distribution import parse_distribution


class SimulateSection(Section):
    """Engines and learner that take given times instead of computing; all else is real."""

    engine: bool = False
    """Rollout actors have simulated engines: tokens mean nothing, times and versions do."""
    learner: bool = False
    """The learner waits for as long as a step would take, and publishes weights unchanged."""
    decode_step_s: float = Field(default=0.0, ge=0)
    """Seconds of a decode step, whatever the number of sequences in it."""
    decode_step_s_per_sequence: float = Field(default=0.0, ge=0)
    """Seconds that each sequence adds to a decode step."""
    prefill_s_per_token: float = Field(default=0.0, ge=0)
    """Seconds of an engine for each context token that is new to it."""
    swap_stall_s: float = Field(default=0.0, ge=0)
    """Seconds that an engine stands still when it exchanges its weights."""
    load_s: float = Field(default=0.0, ge=0)
    """Seconds from when a version begins to travel until an engine can exchange it."""
    reply_tokens: str = "fixed:2"
    """Tokens of a reply: a distribution such as fixed:32, lognormal:200,1.0 or trace:FILE,FIELD."""
    weight_bytes: int = Field(default=1024, ge=4)
    """Bytes that a simulated learner publishes to simulated engines."""
    step_s: float = Field(default=0.0, ge=0)
    """Seconds of a learner step, whatever its tokens."""
    step_s_per_token: float = Field(default=0.0, ge=0)
    """Seconds that each token of the batch, prompts included, adds to a step."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is simulated, for people."""
        named = (("engines", self.engine), ("learner", self.learner))
        return tuple(name for name, simulated in named if simulated)


def simulate_problems(
    simulate: SimulateSection,
    *,
    engine_kind: str,
    num_ranks: int,
    lora_publish: str,
    guard_enabled: bool,
    timeout_s: float,
) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    try:
        parse_distribution(simulate.reply_tokens)
    except ValueError as error:
        yield f"simulate.reply_tokens={simulate.reply_tokens}: {error}"
    if simulate.engine and engine_kind != "embedded":
        yield (
            f"simulate.engine=true, engine.kind={engine_kind}: simulated engines live in rollout "
            "actors; set engine.kind=embedded"
        )
    if simulate.engine and lora_publish == "adapter":
        yield (
            "simulate.engine=true, lora.publish=adapter: a simulated engine has nothing to merge "
            "with; set lora.publish=merged"
        )
    if simulate.learner and num_ranks > 1:
        yield (
            f"simulate.learner=true, learner.num_ranks={num_ranks}: the times are those of the "
            "whole group; set learner.num_ranks=1"
        )
    if simulate.learner and guard_enabled:
        yield (
            "simulate.learner=true, guard.enabled=true: nothing is trained that could collapse; "
            "set guard.enabled=false"
        )
    if simulate.load_s + simulate.swap_stall_s >= timeout_s:
        yield (
            f"simulate.load_s={simulate.load_s:g}: must be below weight_sync.timeout_s="
            f"{timeout_s:g}, or every engine would be lost"
        )
