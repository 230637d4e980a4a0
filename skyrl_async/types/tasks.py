"""What is to be played, and how its replies are sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem: a prompt and what is needed to score it.

    Attributes:
        task_id: unique within its source; the same task has the same id in every run.
        environment: registered name of the environment that plays it.
        seed: given to ``Environment.reset``; all members of a group share it.
        messages: chat messages (``{"role": ..., "content": ...}``) before the first observation.
        extras: given to ``Environment.reset`` as ``options``.
    """

    task_id: str
    environment: str
    seed: int
    messages: tuple[Mapping[str, str], ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.task_id or not self.environment:
            raise ValueError("task_id and environment must not be empty")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one reply.

    Attributes:
        max_tokens: at most this many tokens, the stop token included.
        temperature: divides the logits; 0 is greedy (then logprobs are those of temperature 1).
        top_p: nucleus probability, 1 for the whole vocabulary (training requires 1).
        top_k: number of most likely tokens kept, 0 for the whole vocabulary (training requires 0).
        stop_token_ids: a sampled one ends the reply and is part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One admitted task on its way to a rollout actor.

    Attributes:
        group_id: given at admission.
        task: to be played by all members of the group.
    """

    group_id: int
    task: Task
