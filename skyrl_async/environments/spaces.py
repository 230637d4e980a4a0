"""The Gymnasium space of observations and actions that are text."""

from __future__ import annotations

from typing import Any

import gymnasium

_SURROGATES = range(0xD800, 0xE000)
_LARGEST_CODE_POINT = 0x10FFFF
_MAX_SAMPLED_CHARS = 64


class UnicodeText(gymnasium.Space[str]):
    """Every string of at most ``max_length`` characters, the empty one included.

    ``gymnasium.spaces.Text`` needs a list of allowed characters and refuses an empty string unless
    told otherwise; a language model may say anything, or nothing.

    Args:
        max_length: in characters (code points).
        seed: of :meth:`sample`.
    """

    def __init__(self, max_length: int = 1 << 20, *, seed: int | None = None) -> None:
        if max_length < 0:
            raise ValueError(f"max_length must be >= 0, got {max_length}")
        self.max_length = max_length
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return random text of up to 64 characters, from all of Unicode except surrogates.

        Raises:
            ValueError: if a mask or probabilities are given; this space has none.
        """
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText has neither mask nor probability")
        length = self.np_random.integers(min(self.max_length, _MAX_SAMPLED_CHARS) + 1)
        codes = self.np_random.integers(_LARGEST_CODE_POINT + 1 - len(_SURROGATES), size=length)
        skip = len(_SURROGATES)
        return "".join(chr(c + skip if c >= _SURROGATES.start else c) for c in codes.tolist())

    def contains(self, x: Any) -> bool:
        """Say whether ``x`` is a string that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        """Text does not flatten into an array."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and other.max_length == self.max_length

    def __hash__(self) -> int:
        return hash((UnicodeText, self.max_length))

    def __repr__(self) -> str:
        return f"UnicodeText(max_length={self.max_length})"
