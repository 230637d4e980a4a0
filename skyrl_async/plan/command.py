"""The planner's command line.

::

    python -m skyrl_async.plan --calibrate runs/NAME --sweep staleness=0,1,4,8
    python -m skyrl_async.plan --decode-step-s 0.02 --step-s-per-token 2e-6 --gpus 64 --recommend
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from skyrl_async.distribution import parse_distribution
from skyrl_async.plan.calibration import calibrate
from skyrl_async.plan.episodes import DrawnEpisodes, Episodes, RecordedEpisodes
from skyrl_async.plan.scenario import Costs, Scenario
from skyrl_async.plan.search import (
    Hardware,
    Split,
    forecast,
    search_splits,
    simulate_colocated,
    simulate_split,
)
from skyrl_async.plan.simulation import Stuck
from skyrl_async.plan.table import print_splits

_ENGINE = ("decode_step_s", "decode_step_s_per_sequence", "prefill_s_per_token", "swap_stall_s")
_LEARNER = ("step_s", "step_s_per_token")
_COSTS = ("publish_s", "turn_s", "episode_s", "report_s", "handoff_s")
_SHAPE = {
    "engines": "num_engines",
    "groups_per_step": "groups_per_step",
    "group_size": "group_size",
    "staleness": "max_staleness",
    "max_times_sampled": "max_times_sampled",
    "max_groups_per_engine": "max_groups_per_engine",
}
"""Options and what they are called in a scenario."""

_LEAST = {**dict.fromkeys(_SHAPE, 1), "staleness": 0, "max_concurrent": 1}
"""Smallest value of each, and of what else can be swept."""

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan what the arguments say; exit with 2 on a wrong one."""
    parser = _parser()
    try:
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}; --help lists the options")
        scenario, make_episodes = _scenario(args)
        splits = _splits(args, scenario, make_episodes)
    except (ValueError, argparse.ArgumentError, Stuck) as error:
        parser.exit(_USAGE_ERROR, f"{parser.prog}: {error}\n")
    if args.json:
        json.dump([split.to_json() for split in splits], sys.stdout)
        print()
        return
    print_splits(splits, with_gpus=args.gpus is not None)


def _splits(
    args: argparse.Namespace, scenario: Scenario, make_episodes: Callable[[], Episodes]
) -> list[Split]:
    swept = list(_swept(args.sweep, scenario))
    if args.gpus is None:
        for name in ("recommend", "colocated"):
            if getattr(args, name):
                raise ValueError(f"--{name} divides GPUs; say how many with --gpus")
        return [
            Split(
                num_engines=s.num_engines,
                learner_gpus=0,
                max_staleness=s.max_staleness,
                forecast=forecast(s, make_episodes),
            )
            for s in swept
        ]
    hardware = Hardware(
        num_gpus=args.gpus,
        gpus_per_engine=args.gpus_per_engine,
        learner_gpus_measured=args.learner_gpus_measured,
        gpus_per_rank=args.gpus_per_rank,
        scaling=args.scaling,
    )
    out: list[Split] = []
    for s in swept:
        if args.recommend:
            out += search_splits(s, make_episodes, hardware=hardware)
        else:
            _check_room(s.num_engines, hardware)
            out.append(
                simulate_split(s, make_episodes, hardware=hardware, num_engines=s.num_engines)
            )
    if args.colocated:
        out.append(simulate_colocated(scenario, make_episodes, hardware=hardware))
    return sorted(out, key=lambda s: -s.forecast.trained_tokens_per_s) if args.recommend else out


def _check_room(num_engines: int, hardware: Hardware) -> None:
    """Refuse engines that leave the learner no GPUs.

    Raises:
        ValueError: if they do.
    """
    most = (hardware.num_gpus - hardware.gpus_per_rank) // hardware.gpus_per_engine
    if num_engines > most:
        raise ValueError(
            f"{num_engines} engines of {hardware.gpus_per_engine} GPUs leave a learner rank of "
            f"{hardware.gpus_per_rank} no room in --gpus {hardware.num_gpus}; give --engines of at "
            f"most {most}, or --recommend"
        )


def _scenario(args: argparse.Namespace) -> tuple[Scenario, Callable[[], Episodes]]:
    """Return the scenario, measured or given, and what makes its episodes."""
    base, make = Scenario(costs=Costs(turn_s=0.0)), _drawn(args)
    if args.calibrate is not None:
        measured = calibrate(args.calibrate)
        base = measured.scenario
        if make is None:
            recorded = measured.episodes

            def make() -> Episodes:
                return RecordedEpisodes(recorded, seed=args.seed)

    if make is None:
        raise ValueError("give --calibrate RUN or --reply-tokens DISTRIBUTION")
    costs = replace(
        base.costs,
        engine=_given(base.costs.engine, args, (*_ENGINE, "max_concurrent")),
        learner=_given(base.costs.learner, args, _LEARNER),
    )
    costs = _given(costs, args, _COSTS)
    shape = {
        field: getattr(args, option)
        for option, field in _SHAPE.items()
        if getattr(args, option) is not None
    }
    tokens = ("prompt_tokens", "observation_tokens", "steps", "warmup_steps", "rule")
    return _given(replace(base, costs=costs, **shape), args, tokens), make


def _drawn(args: argparse.Namespace) -> Callable[[], Episodes] | None:
    if args.reply_tokens is None:
        return None
    return lambda: DrawnEpisodes(
        turns=args.turns,
        reply_tokens=args.reply_tokens,
        waits_s=args.latency_s,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def _given(record: Any, args: argparse.Namespace, names: Sequence[str]) -> Any:
    """Return a record with those of its fields replaced that were given."""
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(record, **values)


def _swept(sweeps: Sequence[str], scenario: Scenario) -> list[Scenario]:
    """Return the scenarios of all combinations of the swept values.

    Raises:
        ValueError: on an unknown name, or a value that is no integer or too small.
    """
    axes = []
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if name not in _LEAST or not values:
            raise ValueError(f"--sweep {sweep}: give NAME=V1,V2,… with one of {', '.join(_LEAST)}")
        number = _integer(_LEAST[name])
        try:
            axes.append([(name, number(value)) for value in values.split(",")])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--sweep {sweep}: {error}") from None
    return [_with(scenario, dict(choice)) for choice in product(*axes)]


def _with(scenario: Scenario, values: dict[str, int]) -> Scenario:
    concurrent = values.pop("max_concurrent", None)
    if concurrent is not None:
        engine = replace(scenario.costs.engine, max_concurrent=concurrent)
        scenario = replace(scenario, costs=replace(scenario.costs, engine=engine))
    changes: dict[str, Any] = {_SHAPE[name]: value for name, value in values.items()}
    return replace(scenario, **changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m skyrl_async.plan",
        description="Simulate runs on a virtual clock, with the admission, buffer and staleness "
        "rule of real ones.",
        exit_on_error=False,
    )
    parser.add_argument("--calibrate", type=Path, metavar="RUN", help="measure a run's folder")
    _add_figures(parser)
    _add_shape(parser)
    gpus = parser.add_argument_group("GPUs")
    count = _integer(1)
    gpus.add_argument("--gpus", type=count, help="of engines and learner together")
    gpus.add_argument("--gpus-per-engine", type=count, default=1)
    gpus.add_argument("--gpus-per-rank", type=count, default=1, help="the learner grows by so many")
    gpus.add_argument(
        "--learner-gpus-measured", type=count, default=1, help="that the times of a step are for"
    )
    gpus.add_argument(
        "--scaling", type=_number, default=1.0, help="of the learner's speed per doubling, up to 1"
    )
    gpus.add_argument("--recommend", action="store_true", help="search for the fastest split")
    gpus.add_argument(
        "--colocated", action="store_true", help="also synchronous on all GPUs in turn"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="NAME=V1,V2,…", help=", ".join(_LEAST)
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--seed", type=_integer(0), default=0)
    return parser


def _add_figures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("given figures, in place of measured ones")
    for name in (*_ENGINE, *_LEARNER, *_COSTS):
        group.add_argument(f"--{name.replace('_', '-')}", type=_number, metavar="SECONDS")
    group.add_argument(
        "--max-concurrent", type=_integer(1), help="sequences that an engine decodes"
    )
    for name, default, meaning in (
        ("--turns", "fixed:1", "replies of an episode"),
        ("--reply-tokens", None, "of a reply"),
        ("--latency-s", "fixed:0", "of a tool"),
    ):
        group.add_argument(
            name, type=_distribution, default=default, help=f"{meaning}: a distribution"
        )
    group.add_argument("--max-tokens", type=_integer(1), help="replies are cut here")
    group.add_argument("--prompt-tokens", type=_number)
    group.add_argument("--observation-tokens", type=_number, help="between two replies")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shape, in place of the run's")
    for name in _SHAPE:
        group.add_argument(f"--{name.replace('_', '-')}", type=_integer(_LEAST[name]))
    group.add_argument("--rule", choices=("mask", "drop", "pace"))
    group.add_argument("--steps", type=_integer(1), help="learner steps that are measured")
    group.add_argument("--warmup-steps", type=_integer(0))


def _integer(least: int) -> Callable[[str], int]:
    """Return what reads integers of at least so much."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; give an integer of at least {least}")
        return value

    return read


def _number(text: str) -> float:
    """Read a number that is finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a finite number of at least 0")
    return value


def _distribution(text: str) -> str:
    """Check that a text describes a distribution."""
    try:
        return parse_distribution(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
