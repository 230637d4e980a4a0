"""Distributions of lengths and latencies, as one line of text.

=====================================  ============================================================
``fixed:VALUE``                        always the same
``uniform:LOW,HIGH``                   equally likely from LOW to HIGH
``exponential:MEAN``                   waiting times
``lognormal:MEAN,SIGMA``               heavy tail; SIGMA is of the logarithm
``lognormal:MEAN,SIGMA,LARGEST``       the same, cut at LARGEST (so that the mean is a little less)
``trace:FILE,FIELD``                   recorded values, drawn at random: lines of JSON with FIELD
=====================================  ============================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMS = (
    "fixed:VALUE, uniform:LOW,HIGH, exponential:MEAN, lognormal:MEAN,SIGMA[,LARGEST] or "
    "trace:FILE,FIELD"
)

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Draws non-negative numbers.

    Attributes:
        text: that describes it.
        mean: of the numbers; of a cut ``lognormal`` before the cut.
        draw: takes a generator and a count, gives ``[count]`` numbers.
    """

    text: str
    mean: float
    draw: Draw


@lru_cache(maxsize=64)
def parse_distribution(text: str) -> Distribution:
    """Return the distribution that ``text`` describes; a file is read once per process.

    Raises:
        ValueError: if the text has another form, a number is negative or not finite, or the file
            lacks usable values.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace":
        return _of_values(text, _recorded(text, rest))
    make = _KINDS.get(kind)
    if make is None:
        raise ValueError(f"{text!r} is no distribution; give {FORMS}")
    numbers = _numbers(text, rest)
    least, most, build = make
    if not least <= len(numbers) <= most:
        raise ValueError(f"{text!r} has {len(numbers)} numbers; give {FORMS}")
    return build(text, *numbers)


def _numbers(text: str, rest: str) -> list[float]:
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} needs numbers after the colon; give {FORMS}") from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"the numbers of {text!r} must be finite and >= 0")
    return numbers


def _fixed(text: str, value: float) -> Distribution:
    return Distribution(text=text, mean=value, draw=lambda rng, n: np.full(n, value))


def _uniform(text: str, low: float, high: float) -> Distribution:
    if low > high:
        raise ValueError(f"{text!r}: LOW={low:g} must not be above HIGH={high:g}")
    mean = (low + high) / 2
    return Distribution(text=text, mean=mean, draw=lambda rng, n: rng.uniform(low, high, n))


def _exponential(text: str, mean: float) -> Distribution:
    return Distribution(text=text, mean=mean, draw=lambda rng, n: rng.exponential(mean, n))


def _lognormal(text: str, mean: float, sigma: float, largest: float = math.inf) -> Distribution:
    if not mean:
        return _fixed(text, 0.0)
    location = math.log(mean) - sigma**2 / 2

    def draw(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        return np.minimum(rng.lognormal(location, sigma, count), largest)

    return Distribution(text=text, mean=mean, draw=draw)


def _of_values(text: str, values: NDArray[np.float64]) -> Distribution:
    mean = float(values.mean())
    return Distribution(text=text, mean=mean, draw=lambda rng, n: rng.choice(values, n))


def _recorded(text: str, rest: str) -> NDArray[np.float64]:
    path, _, field = rest.rpartition(",")
    if not path or not field:
        raise ValueError(f"{text!r} needs a file and a field; give {FORMS}")
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        values = np.array([row[field] for row in rows if field in row], np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{text!r}: cannot read numbers from {path} ({error})") from None
    if not len(values) or not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError(
            f"{text!r}: {path} needs at least one line with {field!r}, and all finite and >= 0"
        )
    return values


_KINDS: Mapping[str, tuple[int, int, Callable[..., Any]]] = {
    "fixed": (1, 1, _fixed),
    "uniform": (2, 2, _uniform),
    "exponential": (1, 1, _exponential),
    "lognormal": (2, 3, _lognormal),
}
"""Fewest and most numbers, and what makes it of them."""
