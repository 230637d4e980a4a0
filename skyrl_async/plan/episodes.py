"""What episodes look like to the planner: tokens of each reply, and the waits between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from skyrl_async.distribution import Distribution, parse_distribution

_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One trajectory's demands.

    Attributes:
        first_wait_s: of the environment, before the first prompt.
        reply_tokens: of each reply.
        waits_s: of the environment, after each reply; one per reply.

    Raises:
        ValueError: without a reply, or with another number of waits than replies.
    """

    first_wait_s: float = 0.0
    reply_tokens: tuple[int, ...]
    waits_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.reply_tokens or len(self.reply_tokens) != len(self.waits_s):
            raise ValueError(
                f"an episode needs one wait per reply, and a reply: {len(self.reply_tokens)} "
                f"replies, {len(self.waits_s)} waits"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of all replies."""
        return sum(self.reply_tokens)


class Episodes(Protocol):
    """Where episodes come from."""

    @property
    def mean_tokens(self) -> float:
        """Generated tokens of an episode, on average."""
        ...

    @property
    def mean_turns(self) -> float:
        """Replies of an episode, on average."""
        ...

    def draw(self) -> Episode:
        """Return the next episode."""
        ...


class DrawnEpisodes:
    """Episodes whose turns, lengths and waits are drawn independently.

    Args:
        turns: replies, rounded, at least 1.
        reply_tokens: rounded, at least 1.
        waits_s: after each reply.
        max_tokens: replies are cut here; None leaves them.
        seed: of the numbers.

    Raises:
        ValueError: if a text describes no distribution, or nothing is left of a reply.
    """

    def __init__(
        self,
        *,
        turns: str = "fixed:1",
        reply_tokens: str,
        waits_s: str = "fixed:0",
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        self._turns = _Stream(parse_distribution(turns), seed=seed)
        self._tokens = _Stream(parse_distribution(reply_tokens), seed=seed + 1)
        self._waits = _Stream(parse_distribution(waits_s), seed=seed + 2)
        self._max_tokens = max_tokens

    @property
    def mean_tokens(self) -> float:
        """Generated tokens of an episode, before cuts."""
        tokens = max(1.0, self._tokens.distribution.mean)
        if self._max_tokens is not None:
            tokens = min(tokens, self._max_tokens)
        return tokens * self.mean_turns

    @property
    def mean_turns(self) -> float:
        """Replies of an episode."""
        return max(1.0, self._turns.distribution.mean)

    def draw(self) -> Episode:
        """Return the next episode."""
        turns = range(max(1, round(self._turns.next())))
        tokens = (max(1, round(self._tokens.next())) for _ in turns)
        limit = self._max_tokens
        return Episode(
            reply_tokens=tuple(t if limit is None else min(t, limit) for t in tokens),
            waits_s=tuple(self._waits.next() for _ in turns),
        )


class RecordedEpisodes:
    """Episodes that were seen, drawn at random.

    Args:
        episodes: at least one.
        seed: of the choice.

    Raises:
        ValueError: without any.
    """

    def __init__(self, episodes: Sequence[Episode], *, seed: int = 0) -> None:
        if not episodes:
            raise ValueError("no episode was recorded; calibrate from a longer run")
        self._episodes = tuple(episodes)
        self._rng = np.random.default_rng(seed)
        self._indices: list[int] = []

    @property
    def mean_tokens(self) -> float:
        """Generated tokens of an episode."""
        return sum(e.num_tokens for e in self._episodes) / len(self._episodes)

    @property
    def mean_turns(self) -> float:
        """Replies of an episode."""
        return sum(len(e.reply_tokens) for e in self._episodes) / len(self._episodes)

    def draw(self) -> Episode:
        """Return one of them."""
        if not self._indices:
            self._indices = self._rng.integers(len(self._episodes), size=_AT_ONCE).tolist()
        return self._episodes[self._indices.pop()]


class _Stream:
    """Numbers of a distribution one at a time; drawing many at once is faster."""

    def __init__(self, distribution: Distribution, *, seed: int) -> None:
        self.distribution = distribution
        self._rng = np.random.default_rng(seed)
        self._values: list[float] = []

    def next(self) -> float:
        """Return the next number."""
        if not self._values:
            self._values = self.distribution.draw(self._rng, _AT_ONCE).tolist()
        return self._values.pop()
