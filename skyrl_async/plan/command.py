"""The planner's command line.

::

    python -m skyrl_async.plan --calibrate runs/NAME --sweep staleness=0,1,4,8
    python -m skyrl_async.plan --decode-step-s 0.02 --step-s-per-token 2e-6 --gpus 64 --recommend
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

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

_SWEPT = (*_SHAPE, "max_concurrent")
_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan what the arguments say; exit with 2 on a wrong one."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        scenario, make_episodes = _scenario(args)
        splits = _splits(args, scenario, make_episodes)
    except (ValueError, Stuck) as error:
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
        if args.recommend:
            raise ValueError("--recommend divides GPUs; say how many with --gpus")
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
            engines = min(s.num_engines, (args.gpus - 1) // args.gpus_per_engine)
            out.append(simulate_split(s, make_episodes, hardware=hardware, num_engines=engines))
    if args.colocated:
        out.append(simulate_colocated(scenario, make_episodes, hardware=hardware))
    return sorted(out, key=lambda s: -s.forecast.trained_tokens_per_s) if args.recommend else out


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
        ValueError: on an unknown name, or a value that is no integer.
    """
    axes = []
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if name not in _SWEPT or not values:
            raise ValueError(f"--sweep {sweep}: give NAME=V1,V2,… with one of {', '.join(_SWEPT)}")
        try:
            axes.append([(name, int(value)) for value in values.split(",")])
        except ValueError:
            raise ValueError(f"--sweep {sweep}: the values must be integers") from None
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
    )
    parser.add_argument("--calibrate", type=Path, metavar="RUN", help="measure a run's folder")
    _add_figures(parser)
    _add_shape(parser)
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument("--gpus", type=int, help="of engines and learner together")
    gpus.add_argument("--gpus-per-engine", type=int, default=1)
    gpus.add_argument("--gpus-per-rank", type=int, default=1, help="the learner grows by so many")
    gpus.add_argument(
        "--learner-gpus-measured", type=int, default=1, help="that the times of a step are for"
    )
    gpus.add_argument(
        "--scaling", type=float, default=1.0, help="of the learner's speed per doubling, up to 1"
    )
    gpus.add_argument("--recommend", action="store_true", help="search for the fastest split")
    gpus.add_argument(
        "--colocated", action="store_true", help="also synchronous on all GPUs in turn"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="NAME=V1,V2,…", help=", ".join(_SWEPT)
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _add_figures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("given figures, in place of measured ones")
    for name in (*_ENGINE, *_LEARNER, *_COSTS):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="SECONDS")
    group.add_argument("--max-concurrent", type=int, help="sequences that an engine decodes")
    group.add_argument("--turns", default="fixed:1", help="replies of an episode: a distribution")
    group.add_argument("--reply-tokens", help="of a reply: a distribution")
    group.add_argument("--latency-s", default="fixed:0", help="of a tool: a distribution")
    group.add_argument("--max-tokens", type=int, help="replies are cut here")
    group.add_argument("--prompt-tokens", type=float)
    group.add_argument("--observation-tokens", type=float, help="between two replies")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shape, in place of the run's")
    for name in _SHAPE:
        group.add_argument(f"--{name.replace('_', '-')}", type=int)
    group.add_argument("--rule", choices=("mask", "drop", "pace"))
    group.add_argument("--steps", type=int, help="learner steps that are measured")
    group.add_argument("--warmup-steps", type=int)
