"""Measures a finished run: how long everything took, from its timeline and its metrics."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.plan.episodes import Episode
from skyrl_async.plan.scenario import Costs, Scenario
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes
from skyrl_async.timeline.reader import Span, Trace, TraceLane, read_trace

_MIN_STEPS = 5
_MAX_GAP_S = 1e-4
_LONGEST_HANDOFF_S = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a run says about durations and episodes.

    Attributes:
        scenario: of the run itself, with its costs.
        episodes: that were on the timeline.
    """

    scenario: Scenario
    episodes: tuple[Episode, ...]


def calibrate(run_folder: Path) -> Calibration:
    """Measure a run that has a timeline (``logging.trace=true``).

    Raises:
        ValueError: if a file is missing, or the run was too short to measure.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_folder / name).is_file():
            raise ValueError(
                f"{run_folder} cannot be measured: it has no {name}; give the folder of a run"
            )
    try:
        config = load_config(run_folder / "config.yaml")
        lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{run_folder} cannot be measured: {reason}") from None
    metrics = [json.loads(line) for line in lines if line.endswith("}")]
    trace = read_trace(run_folder)
    if len(metrics) < _MIN_STEPS or not trace.lanes:
        raise ValueError(
            f"{run_folder} has {len(metrics)} steps and {len(trace.lanes)} lanes on its timeline; "
            f"measuring needs {_MIN_STEPS} steps of a run with logging.trace=true"
        )
    measured = [_episodes(lane) for lane in trace.lanes if lane.role == "slot"]
    episodes = tuple(episode for lane in measured for episode, _ in lane)
    if not episodes:
        raise ValueError(f"{run_folder} has no whole episode on its timeline; run it for longer")
    turns = sum(len(episode.reply_tokens) for episode in episodes)
    own_s = sum(seconds for lane in measured for _, seconds in lane)
    observed = _observation_tokens(trace, metrics, config=config, episodes=episodes)
    costs = _costs(trace, metrics, config=config, turn_s=own_s / turns, observed=observed)
    return Calibration(scenario=scenario_of(config, costs, observed=observed), episodes=episodes)


def scenario_of(config: Config, costs: Costs, *, observed: float) -> Scenario:
    """Return the scenario of a configuration.

    Args:
        config: of a run whose actors have engines of their own.
        costs: of everything.
        observed: tokens of a prompt, or between two replies.
    """
    return Scenario(
        num_engines=config.rollout.num_actors,
        groups_per_step=config.learner.groups_per_step,
        group_size=config.rollout.group_size,
        max_staleness=config.staleness.max,
        rule=config.staleness.rule,
        max_times_sampled=config.replay.max_times_sampled,
        max_groups_per_engine=config.rollout.max_groups_per_actor,
        prompt_tokens=observed,
        observation_tokens=observed,
        costs=costs,
    )


def _costs(
    trace: Trace,
    metrics: Sequence[Mapping[str, Any]],
    *,
    config: Config,
    turn_s: float,
    observed: float,
) -> Costs:
    swaps = [s.duration_s for s in _spans(trace, "engine", "swap")]
    swap_s = statistics.median(swaps) if swaps else 0.0
    transfers = [s.duration_s for s in _spans(trace, "publisher", "transfer")]
    waits = [s.duration_s for s in _spans(trace, "learner", "wait")]
    return Costs(
        engine=_engine_times(trace, config=config, swap_s=swap_s),
        learner=_step_times(trace, metrics, config=config, observed=observed),
        publish_s=max(0.0, statistics.median(transfers) - swap_s) if transfers else 0.0,
        turn_s=turn_s,
        # A learner that always has a batch waits only for the batch to be handed over.
        handoff_s=min(_LONGEST_HANDOFF_S, *waits) if waits else 0.0,
    )


def _engine_times(trace: Trace, *, config: Config, swap_s: float) -> EngineTimes:
    """Fit seconds of decoding to steps, tokens and prefilled tokens."""
    rows = [
        (s.duration_s, *(float(s.args.get(name, 0)) for name in ("steps", "tokens", "prefilled")))
        for s in _spans(trace, "engine", "decode")
    ]
    rows += [
        (s.duration_s, 1.0, 0.0, float(s.args.get("tokens", 0)))
        for s in _spans(trace, "engine", "recompute")
    ]
    if not rows:
        raise ValueError("the timeline has no decoding; measuring needs embedded engines")
    table = np.array(rows)
    per_step, per_token, per_prefilled = fit_nonnegative(table[:, 1:], table[:, 0])
    return EngineTimes(
        decode_step_s=per_step,
        decode_step_s_per_sequence=per_token,
        prefill_s_per_token=per_prefilled,
        swap_stall_s=swap_s,
        max_concurrent=config.engine.max_concurrent,
        recomputes_kv=config.engine.kv_after_swap == "recompute",
    )


def _step_times(
    trace: Trace, metrics: Sequence[Mapping[str, Any]], *, config: Config, observed: float
) -> StepTimes:
    """Fit seconds of a learner step to its tokens, those of prompts included."""
    seconds = {
        s.args.get("policy_version"): (s.duration_s, float(s.args.get("tokens", 0)))
        for s in _spans(trace, "learner", "learner step")
    }
    trajectories = config.learner.groups_per_step * config.rollout.group_size
    rows = []
    for row in metrics[1:]:  # the first step of a process warms up
        if row.get("policy_version") not in seconds:
            continue
        duration_s, tokens = seconds[row["policy_version"]]
        prompts = trajectories * row.get("rollout/turns_mean", 1.0) * observed
        rows.append((duration_s, 1.0, row.get("learner/batch_tokens", tokens + prompts)))
    if not rows:
        raise ValueError("the timeline has no learner step that the metrics have too")
    table = np.array(rows)
    step_s, per_token = fit_nonnegative(table[:, 1:], table[:, 0])
    return StepTimes(step_s=step_s, step_s_per_token=per_token)


def fit_nonnegative(columns: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """Return the coefficients >= 0 whose sum of ``columns`` is closest to ``values``.

    With a handful of columns, the best of the least-squares fits of all subsets of them whose
    coefficients are not negative is the exact solution.

    Args:
        columns: ``[N, C]``.
        values: ``[N]``.
    """
    count = columns.shape[1]
    best, best_error = np.zeros(count), float(np.square(values).sum())
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = columns[:, chosen]
            found, *_ = np.linalg.lstsq(part, values, rcond=None)
            error = float(np.square(values - part @ found).sum())
            if found.min() >= 0 and error < best_error:
                best, best_error = np.zeros(count), error
                best[list(chosen)] = found
    return [float(value) for value in best]


def _spans(trace: Trace, role: str, name: str) -> Iterator[Span]:
    for lane in trace.lanes:
        if lane.role == role:
            yield from (span for span in lane.spans if span.name == name)


def _episodes(lane: TraceLane) -> list[tuple[Episode, float]]:
    """Return the whole episodes of a slot, each with the seconds of our own code in it."""
    out: list[tuple[Episode, float]] = []
    for spans in _episode_spans(lane.spans):
        tokens = [int(s.args.get("tokens", 0)) for s in spans if s.name == "generate"]
        if not tokens or not all(tokens):
            continue
        waits, first_s, own_s = _waits(spans)
        episode = Episode(first_wait_s=first_s, reply_tokens=tuple(tokens), waits_s=tuple(waits))
        out.append((episode, own_s))
    return out


def _episode_spans(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield the spans of each episode: up to the wait for its group, or a gap."""
    current: list[Span] = []
    end_s = 0.0  # of all so far: where spans start together, an empty one may come last
    for span in spans:
        if current and span.start_s - end_s > _MAX_GAP_S:
            yield current
            current = []
        end_s = max(end_s, span.end_s)
        if span.name == "wait_group":
            yield current
            current = []
            continue
        current.append(span)
    yield current


def _waits(spans: Sequence[Span]) -> tuple[list[float], float, float]:
    """Return the waits after each reply, that before the first, and the time of our own code."""
    waits: list[float] = []
    first_s = own_s = 0.0
    for span in spans:
        if span.name == "generate":
            waits.append(0.0)
        elif span.name == "other":
            own_s += span.duration_s
        elif span.name == "environment":
            if waits:
                waits[-1] += span.duration_s
            else:
                first_s += span.duration_s
    return waits, first_s, own_s


def _observation_tokens(
    trace: Trace,
    metrics: Sequence[Mapping[str, Any]],
    *,
    config: Config,
    episodes: Sequence[Episode],
) -> float:
    """Return the tokens that an environment adds per turn, on average."""
    turns = sum(len(e.reply_tokens) for e in episodes) / len(episodes)
    batch = [row["learner/batch_tokens"] for row in metrics if "learner/batch_tokens" in row]
    if batch:
        generated = sum(e.num_tokens for e in episodes) / len(episodes)
        size = config.learner.groups_per_step * config.rollout.group_size
        return max(0.0, (statistics.fmean(batch) / size - generated) / turns)
    prefilled = sum(float(s.args.get("prefilled", 0)) for s in _spans(trace, "engine", "decode"))
    finished = sum(
        row.get("throughput/trajectories_per_s", 0.0) * (row["time_s"] - before["time_s"])
        for before, row in pairwise(metrics)
    )
    return prefilled / max(1.0, finished * turns)
