"""Which split of some GPUs between engines and learner is the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from skyrl_async.plan.episodes import Episodes
from skyrl_async.plan.scenario import Forecast, Scenario
from skyrl_async.plan.simulation import Simulation
from skyrl_async.simulate.step_times import StepTimes

_MAX_TRAJECTORIES = 512
_FIRST_SPLITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """GPUs, and for how many of them the costs were measured.

    Attributes:
        num_gpus: of engines and learner together.
        gpus_per_engine: of one engine, as its costs were measured.
        learner_gpus_measured: of the learner group whose costs were measured.
        gpus_per_rank: the learner grows by so many at once.
        scaling: share of the speed that is left when the learner's GPUs double, 1 for all.

    Raises:
        ValueError: if the GPUs do not suffice for an engine and a rank, or a number is too small.
    """

    num_gpus: int
    gpus_per_engine: int = 1
    learner_gpus_measured: int = 1
    gpus_per_rank: int = 1
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gpus_per_engine", "learner_gpus_measured", "gpus_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0.5 < self.scaling <= 1:
            raise ValueError(f"scaling must be in (0.5, 1], got {self.scaling}")
        if self.num_gpus < self.gpus_per_engine + self.gpus_per_rank:
            raise ValueError(
                f"{self.num_gpus} GPUs are too few: an engine takes {self.gpus_per_engine}, a "
                f"learner rank {self.gpus_per_rank}; give at least "
                f"{self.gpus_per_engine + self.gpus_per_rank}"
            )

    def learner(self, times: StepTimes, *, gpus: float) -> StepTimes:
        """Return the times of a learner on other GPUs than those measured."""
        ratio = gpus / self.learner_gpus_measured
        speed = ratio * self.scaling ** max(0.0, math.log2(ratio)) if ratio > 1 else ratio
        return replace(times, step_s_per_token=times.step_s_per_token / speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One division of the GPUs, and what it does.

    Attributes:
        num_engines: engines.
        learner_gpus: GPUs of the learner.
        colocated: both use all GPUs in turn, as synchronous systems do.
        max_staleness: ``K``.
        forecast: of it.
    """

    num_engines: int
    learner_gpus: int
    colocated: bool = False
    max_staleness: int
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return {
            "engines": self.num_engines,
            "learner_gpus": self.learner_gpus,
            "colocated": self.colocated,
            "max_staleness": self.max_staleness,
            **self.forecast.to_json(),
        }


def forecast(scenario: Scenario, make_episodes: Callable[[], Episodes]) -> Forecast:
    """Simulate a scenario, a large one at a fraction of its size.

    Engines and groups are divided by about the same number and the learner's time per token is
    multiplied by it: every engine has the same load, every step the same duration. What is lost is
    that the longest of many groups is longer than that of few.

    Args:
        scenario: what.
        make_episodes: gives the same episodes every time.
    """
    small = divided(scenario)
    factor = scenario.groups_per_step / small.groups_per_step
    result = Simulation(small, make_episodes()).run()
    return replace(
        result,
        tokens_per_s=result.tokens_per_s * factor,
        trained_tokens_per_s=result.trained_tokens_per_s * factor,
        trajectories_per_s=result.trajectories_per_s * factor,
    )


def divided(scenario: Scenario, *, max_trajectories: int = _MAX_TRAJECTORIES) -> Scenario:
    """Return a scenario with fewer engines and groups that behaves the same.

    Args:
        scenario: a large one; one with few trajectories or a single engine is returned as it is.
        max_trajectories: of a step of the result, if that leaves an engine.
    """
    engines, groups = scenario.num_engines, scenario.groups_per_step
    most = max(1, engines * max_trajectories // (groups * scenario.group_size))
    if most >= engines:
        return scenario

    def rounding(num_engines: int) -> tuple[float, int]:
        exact = groups * num_engines / engines
        return abs(max(1, round(exact)) / exact - 1), -num_engines

    # Of the larger half that which changes an engine's load least, the largest of equals.
    num_engines = min(range((most + 1) // 2, most + 1), key=rounding)
    num_groups = max(1, round(groups * num_engines / engines))
    times = scenario.costs.learner
    per_token = times.step_s_per_token * groups / num_groups
    return replace(
        scenario,
        num_engines=num_engines,
        groups_per_step=num_groups,
        costs=replace(scenario.costs, learner=replace(times, step_s_per_token=per_token)),
    )


def simulate_split(
    scenario: Scenario,
    make_episodes: Callable[[], Episodes],
    *,
    hardware: Hardware,
    num_engines: int,
) -> Split:
    """Simulate one split; the learner has the GPUs that the engines leave."""
    gpus = hardware.num_gpus - num_engines * hardware.gpus_per_engine
    learner = hardware.learner(scenario.costs.learner, gpus=gpus)
    costs = replace(scenario.costs, learner=learner)
    shaped = replace(scenario, num_engines=num_engines, costs=costs)
    return Split(
        num_engines=num_engines,
        learner_gpus=gpus,
        max_staleness=scenario.max_staleness,
        forecast=forecast(shaped, make_episodes),
    )


def simulate_colocated(
    scenario: Scenario, make_episodes: Callable[[], Episodes], *, hardware: Hardware
) -> Split:
    """Simulate synchronous training that gives all GPUs to engines and learner in turn."""
    num_engines = hardware.num_gpus // hardware.gpus_per_engine
    learner = hardware.learner(scenario.costs.learner, gpus=hardware.num_gpus)
    shaped = replace(
        scenario,
        num_engines=num_engines,
        max_staleness=0,
        rule="mask",
        costs=replace(scenario.costs, learner=learner),
    )
    return Split(
        num_engines=num_engines,
        learner_gpus=hardware.num_gpus,
        colocated=True,
        max_staleness=0,
        forecast=forecast(shaped, make_episodes),
    )


def search_splits(
    scenario: Scenario, make_episodes: Callable[[], Episodes], *, hardware: Hardware
) -> list[Split]:
    """Return simulated splits, the fastest in trained tokens first.

    Splits over the whole range are tried, then those between the best and its neighbours.
    """
    tried: dict[int, Split] = {}
    numbers = sorted(set(_candidates(hardware)))
    chosen = _spread(numbers, _FIRST_SPLITS)
    while chosen:
        for engines in chosen:
            tried[engines] = simulate_split(
                scenario, make_episodes, hardware=hardware, num_engines=engines
            )
        best = max(tried, key=lambda n: tried[n].forecast.trained_tokens_per_s)
        below = [
            n for n in numbers if n < best and n > max((t for t in tried if t < best), default=0)
        ]
        above = [
            n for n in numbers if best < n < min((t for t in tried if t > best), default=n + 1)
        ]
        chosen = [*_spread(below, 1), *_spread(above, 1)]
    return sorted(tried.values(), key=lambda s: -s.forecast.trained_tokens_per_s)


def _candidates(hardware: Hardware) -> Iterator[int]:
    """Yield the numbers of engines that leave the learner a multiple of its step."""
    per_engine, step = hardware.gpus_per_engine, hardware.gpus_per_rank
    for num_engines in range(1, (hardware.num_gpus - step) // per_engine + 1):
        if (hardware.num_gpus - num_engines * per_engine) % step == 0:
            yield num_engines


def _spread(numbers: list[int], count: int) -> list[int]:
    """Return at most so many of the numbers, evenly spread."""
    if len(numbers) <= count:
        return numbers
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
