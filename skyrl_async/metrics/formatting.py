"""Numbers as short text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def number(value: float | None) -> str:
    """Return three significant digits with a suffix for thousands; ``-`` for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    value = float(f"{value:.3g}")
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{_three_digits(value / limit)}{suffix}"
    return _three_digits(value)


def percent(fraction: float | None) -> str:
    """Return a share of 1 in percent."""
    if fraction is None:
        return "-"
    value = 100 * fraction
    return f"{value:.1f}%" if 0 < abs(value) < 9.95 else f"{value:.0f}%"


def size(size_bytes: float | None) -> str:
    """Return a number of bytes in B, kB, MB or GB; ``-`` for None."""
    if size_bytes is None:
        return "-"
    text = number(float(size_bytes))
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float) -> str:
    """Return ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], *, width: int, from_zero: bool = False) -> str:
    """Return ``values`` as at most ``width`` block characters, neighbors averaged to fit.

    The blocks span the smallest to the largest value, or, if ``from_zero``, 0 to half as much again
    as the largest (so that a steady number is a flat line, not magnified noise).
    """
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), 1.5 * max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return _BLOCKS[0 if from_zero else 3] * len(values)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def short_time(seconds: float | None) -> str:
    """Return a short time in ms or s; ``-`` for None."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:.{decimals}f}" if decimals <= 5 else f"{value:.1e}"
