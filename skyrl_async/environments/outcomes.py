"""Checking what an environment returned, and describing what it raised."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.types import DropReason

_BOOLS = (bool, np.bool_)
_SEQUENCES = (tuple, list)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an environment answered to one reply.

    Attributes:
        observation: text, without lone surrogates.
        reward: finite.
        terminated: the task ended.
        truncated: a limit of the environment ended it.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool


def checked_reset(value: Any, *, max_observation_chars: int) -> str:
    """Return the observation of what ``reset`` returned.

    Raises:
        EnvironmentFailure: if it is not ``(str, dict)``, or the text is too long.
    """
    if not isinstance(value, _SEQUENCES) or len(value) != 2:
        raise _wrong(f"reset must return (observation, info), got {_shown(value)}")
    observation, info = value
    if type(info) is not dict and not isinstance(info, Mapping):
        raise _wrong(f"reset must return a dict as info, got {_shown(info)}")
    return _checked_observation(observation, max_observation_chars)


def checked_step(value: Any, *, max_observation_chars: int) -> StepOutcome:
    """Return what ``step`` returned as a record.

    Raises:
        EnvironmentFailure: if it is not ``(str, finite real, bool, bool, dict)``, or the text is
            too long.
    """
    if not isinstance(value, _SEQUENCES) or len(value) != 5:
        raise _wrong(
            "step must return (observation, reward, terminated, truncated, info), "
            f"got {_shown(value)}"
        )
    observation, reward, terminated, truncated, info = value
    if not isinstance(terminated, _BOOLS) or not isinstance(truncated, _BOOLS):
        raise _wrong(
            "step must return bools as terminated and truncated, "
            f"got {_shown(terminated)} and {_shown(truncated)}"
        )
    if type(info) is not dict and not isinstance(info, Mapping):
        raise _wrong(f"step must return a dict as info, got {_shown(info)}")
    return StepOutcome(
        _checked_observation(observation, max_observation_chars),
        _checked_reward(reward),
        bool(terminated),
        bool(truncated),
    )


def failure_of(error: BaseException, *, doing: str, task_id: str) -> EnvironmentFailure:
    """Return the failure that ``error``, raised by an environment, means for its episode.

    Args:
        error: an :class:`EnvironmentFailure` keeps its reason.
        doing: what was called.
        task_id: of the episode.
    """
    if isinstance(error, EnvironmentFailure):
        return EnvironmentFailure(error.reason, f"{task_id}: {error.detail}")
    return EnvironmentFailure(
        DropReason.ENVIRONMENT_ERROR, f"{task_id}: {described_error(error, doing=doing)}"
    )


def described_error(error: BaseException, *, doing: str) -> str:
    """Return ``"step raised ValueError: text (file.py:12)"``."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be shown)"
    trace = error.__traceback__
    place = ""
    while trace is not None:
        place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{doing} raised {type(error).__name__}: {text[:300]}{place}"


def _checked_observation(observation: Any, max_chars: int) -> str:
    if not isinstance(observation, str):
        raise _wrong(f"the observation must be a str, got {_shown(observation)}")
    if len(observation) > max_chars:
        raise EnvironmentFailure(
            DropReason.OVERLONG_OBSERVATION,
            f"the observation has {len(observation)} characters, the limit is {max_chars}; "
            "shorten it or raise environment.max_observation_chars",
        )
    return observation if observation.isascii() else _without_lone_surrogates(observation)


def _without_lone_surrogates(text: str) -> str:
    """Replace them by U+FFFD and join pairs into one character: no tokenizer can encode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _checked_reward(reward: Any) -> float:
    if type(reward) is float and math.isfinite(reward):
        return reward
    if isinstance(reward, numbers.Real | np.bool_):
        try:
            value = float(reward)
        except OverflowError:
            value = math.inf
        if math.isfinite(value):
            return value
        raise EnvironmentFailure(DropReason.NONFINITE_REWARD, f"the reward is {value}")
    raise EnvironmentFailure(
        DropReason.NONFINITE_REWARD,
        f"the reward must be a finite real number, got {_shown(reward)}",
    )


def _wrong(detail: str) -> EnvironmentFailure:
    return EnvironmentFailure(DropReason.ENVIRONMENT_ERROR, detail)


def _shown(value: Any) -> str:
    """Name the type of a value; its repr is user code, and may be endless."""
    name = type(value).__name__
    return f"{name} of length {len(value)}" if isinstance(value, tuple | list | str) else name
