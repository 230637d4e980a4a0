"""What the report says of a dropped group: what happened, and what one can do about it."""

from __future__ import annotations

from skyrl_async.types import DropReason

DROPS: dict[DropReason, tuple[str, str]] = {
    DropReason.ENVIRONMENT_ERROR: (
        "the environment raised an error",
        "run.log has the errors",
    ),
    DropReason.STEP_TIMEOUT: (
        "a reset or step of the environment took too long",
        "raise environment.step_timeout_s",
    ),
    DropReason.EPISODE_TIMEOUT: (
        "an episode took too long",
        "raise environment.episode_timeout_s, or lower environment.max_turns",
    ),
    DropReason.NONFINITE_REWARD: (
        "a reward was NaN or infinite",
        "mend the environment's reward",
    ),
    DropReason.OVERLONG_OBSERVATION: (
        "an observation was longer than allowed",
        "raise environment.max_observation_chars, or shorten observations",
    ),
    DropReason.TOO_FEW_MEMBERS: (
        "too few trajectories of the group finished",
        "see the reasons of their failures",
    ),
    DropReason.STALE: (
        "no token was young enough when it was to be trained",
        "raise staleness.max, or shorten episodes",
    ),
    DropReason.NONFINITE_UPDATE: (
        "loss or gradient of its step was not finite",
        "lower optimizer.learning_rate, or bound the importance weights",
    ),
    DropReason.ZERO_VARIANCE: (
        "all members had the same reward, which teaches nothing",
        "choose tasks that are neither too easy nor too hard",
    ),
    DropReason.PASS_RATE: (
        "too many members solved the task",
        "choose harder tasks, or relax filters.*",
    ),
    DropReason.TRUNCATED: (
        "too many members ran into a limit of length",
        "raise sampling.max_tokens or engine.context_length",
    ),
    DropReason.ROLLBACK: (
        "generated before the learner went back to earlier weights",
        "see the actions of the collapse guard",
    ),
    DropReason.SHUTDOWN: (
        "the run ended",
        "nothing to do",
    ),
}

ROLES = {
    "learner": "share of the learner's wall time",
    "engine": "share of the engines' wall time",
    "actor": "share of the wall time of the actors' episode slots",
}
"""Roles of the idle ledger, and what their shares are shares of."""
