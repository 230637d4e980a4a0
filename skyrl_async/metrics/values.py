"""Small accumulators that know how a number is merged over an interval and over workers.

Every class makes an empty accumulator when called without arguments, takes another one of its own
kind with ``merge``, and is a plain picklable object. An accumulator that saw nothing has the value
None, which is not written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike


class Accumulator(Protocol):
    """What a recorder needs of a merged number."""

    def merge(self, other: Self) -> None:
        """Take in what ``other`` has seen; ``other`` stays as it is."""

    def value(self) -> float | None:
        """Return the merged number, None if nothing was seen."""


class Mean:
    """Weighted mean."""

    __slots__ = ("total", "weight")

    def __init__(self, value: float | None = None, *, weight: float = 1.0) -> None:
        self.total = 0.0
        self.weight = 0.0
        if value is not None:
            self.add(value, weight=weight)

    @classmethod
    def of(cls, values: ArrayLike) -> Mean:
        """Return the mean of an array of any shape, each element with weight 1."""
        array = np.asarray(values, dtype=np.float64)
        mean = cls()
        mean.total, mean.weight = float(array.sum()), float(array.size)
        return mean

    def add(self, value: float, *, weight: float = 1.0) -> None:
        """Take in ``value``.

        Raises:
            ValueError: if ``weight`` is negative or not finite.
        """
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {weight}")
        if weight:
            self.total += value * weight
            self.weight += weight

    def merge(self, other: Mean) -> None:
        """Take in what ``other`` has seen."""
        self.total += other.total
        self.weight += other.weight

    def value(self) -> float | None:
        """Return the mean."""
        return self.total / self.weight if self.weight else None


class Std:
    """Standard deviation of a population, merged by the method of Chan, Golub and LeVeque."""

    __slots__ = ("count", "mean", "squares")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    @classmethod
    def of(cls, values: ArrayLike) -> Std:
        """Return the deviation of an array of any shape."""
        array = np.asarray(values, dtype=np.float64)
        std = cls()
        if array.size:
            std.count, std.mean = int(array.size), float(array.mean())
            std.squares = float(((array - std.mean) ** 2).sum())
        return std

    def merge(self, other: Std) -> None:
        """Take in what ``other`` has seen."""
        if not other.count:
            return
        count = self.count + other.count
        delta = other.mean - self.mean
        self.mean += delta * other.count / count
        self.squares += other.squares + delta**2 * self.count * other.count / count
        self.count = count

    def value(self) -> float | None:
        """Return the deviation."""
        return math.sqrt(self.squares / self.count) if self.count else None


@dataclass(slots=True)
class Sum:
    """Sum; an interval without additions has the value 0."""

    total: float = 0

    def merge(self, other: Sum) -> None:
        """Take in what ``other`` has seen."""
        self.total += other.total

    def value(self) -> float:
        """Return the sum."""
        return self.total


@dataclass(slots=True)
class Max:
    """Largest value; NaN wins, so that it is not lost."""

    largest: float | None = None

    def add(self, value: float) -> None:
        """Take in ``value``."""
        if self.largest is None or value > self.largest or value != value:
            self.largest = value

    def merge(self, other: Max) -> None:
        """Take in what ``other`` has seen."""
        if other.largest is not None:
            self.add(other.largest)

    def value(self) -> float | None:
        """Return the largest value."""
        return self.largest


@dataclass(slots=True)
class Histogram:
    """How often each integer was seen.

    Attributes:
        counts: value -> times seen, without order.
    """

    counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: ArrayLike) -> Histogram:
        """Count the elements of an integer array of any shape.

        Raises:
            ValueError: if the array is not of integers.
        """
        array = np.asarray(values)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"a histogram counts integers, got an array of {array.dtype}")
        numbers, counts = np.unique(array, return_counts=True)
        return cls(dict(zip(numbers.astype(int).tolist(), counts.tolist(), strict=True)))

    def add(self, number: int, *, count: int = 1) -> None:
        """Count ``number`` ``count`` times.

        Raises:
            ValueError: if ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if count:
            self.counts[number] = self.counts.get(number, 0) + count

    def merge(self, other: Histogram) -> None:
        """Take in what ``other`` has seen."""
        for number, count in other.counts.items():
            self.add(number, count=count)

    @property
    def total(self) -> int:
        """How many numbers were seen."""
        return sum(self.counts.values())

    def value(self) -> float | None:
        """Return the mean."""
        total = self.total
        return sum(number * n for number, n in self.counts.items()) / total if total else None

    def percentile(self, percent: float) -> int | None:
        """Return the smallest number with at least ``percent`` percent at or below it.

        Raises:
            ValueError: if ``percent`` is outside 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be in [0, 100], got {percent}")
        needed = self.total * percent / 100
        seen = 0
        for number, count in sorted(self.counts.items()):
            seen += count
            if seen >= needed:
                return number
        return None

    @property
    def max(self) -> int | None:
        """Largest number seen."""
        return max(self.counts, default=None)


def ordered(counts: Mapping[int, int]) -> dict[int, int]:
    """Return the counts of a histogram in the order of their numbers."""
    return dict(sorted(counts.items()))
