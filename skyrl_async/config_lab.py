"""The section of the staleness lab: controlled lag, mismatch and stragglers, for experiments."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from skyrl_async.config_learner import LearnerSection
from skyrl_async.config_section import Section


class LabSection(Section):
    """What makes training worse on purpose, to measure what an algorithm can bear."""

    exact_lag: int | None = Field(default=None, ge=0, le=1024)
    """Every trained token is exactly so many versions old, in lock step; null for a normal run."""
    logprob_noise: float = Field(default=0.0, ge=0)
    """Standard deviation in nats of noise on the logprobs that engines report."""
    straggler_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the episodes, drawn at random, that are slowed."""
    straggler_factor: float = Field(default=1.0, ge=1, le=1000)
    """Slowed episodes take so many times as long."""


def lab_problems(
    lab: LabSection,
    *,
    engine_kind: str,
    max_staleness: int,
    max_times_sampled: int,
    guard_enabled: bool,
    resume: str,
    learner: LearnerSection,
) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    if (lab.straggler_fraction > 0) != (lab.straggler_factor > 1):
        yield (
            f"lab.straggler_fraction={lab.straggler_fraction:g}, "
            f"lab.straggler_factor={lab.straggler_factor:g}: no episode would be slowed; set the "
            "first above 0 and the second above 1, or neither"
        )
    lag = lab.exact_lag
    if lag is None:
        return
    given = f"lab.exact_lag={lag}"
    if max_staleness != lag:
        yield (
            f"{given}, staleness.max={max_staleness}: every token is exactly {lag} versions old; "
            f"set staleness.max={lag}"
        )
    if max_times_sampled > 1:
        yield (
            f"{given}, replay.max_times_sampled={max_times_sampled}: a second use would train "
            "tokens that are older; set replay.max_times_sampled=1"
        )
    if engine_kind != "embedded":
        yield (
            f"{given}, engine.kind={engine_kind}: a server that is started again would need "
            "weights that nobody keeps; set engine.kind=embedded"
        )
    if guard_enabled:
        yield (
            f"{given}, guard.enabled=true: its actions change the staleness; set "
            "guard.enabled=false"
        )
    if resume != "never":
        yield (
            f"{given}, run.resume={resume}: checkpoints have no older weights; set run.resume=never"
        )
    if learner.num_shard_ranks > 1:
        yield (
            f"{given}, learner.num_ranks={learner.num_ranks}: weights shared by "
            f"{learner.num_shard_ranks} ranks are gathered newest first, and versions are left "
            "out; set learner.shard_ranks=1"
        )
