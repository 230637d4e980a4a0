"""The first lines of the report: how the run ended, what it reached, and what it wasted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_async.metrics.formatting import duration, number
from skyrl_async.metrics.waste import WasteFacts, largest_waste
from skyrl_async.report.history import History
from skyrl_async.report.run_files import config_value
from skyrl_async.report.wording import ROLES

UNFINISHED = "unfinished"
"""Status of a run without a summary: it goes on, or was killed."""


def headline(
    history: History, *, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Return status, error, subtitle and the tiles (label, value, note, whether all is well)."""
    return {
        "status": summary.get("status") or UNFINISHED,
        "error": summary.get("error") or "",
        "subtitle": _subtitle(config),
        "tiles": [
            _reward(history, summary),
            _progress(history, config, summary),
            _staleness(history, config, summary),
            _throughput(history, summary),
        ],
    }


def largest_waste_text(
    history: History, *, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return text and knob of the largest waste, None if there is none or it is not known."""
    waste = summary.get("largest_waste")
    if isinstance(waste, Mapping):
        return {"text": waste.get("text") or "", "knob": waste.get("knob") or ""}
    facts = _facts(config)
    if summary or facts is None:
        return None
    found = largest_waste({role: history.time_shares(role) for role in ROLES}, facts)
    return None if found is None else {"text": found.text, "knob": found.knob}


def _facts(config: Mapping[str, Any]) -> WasteFacts | None:
    keys = ("engine.kind", "staleness.max", "engine.kv_after_swap")
    kind, bound, kv = (config_value(config, key) for key in keys)
    if kind is None or bound is None or kv is None:
        return None
    return WasteFacts(engine_kind=kind, staleness_max=bound, kv_after_swap=kv)


def _subtitle(config: Mapping[str, Any]) -> str:
    parts = [
        config_value(config, "environment.name"),
        config_value(config, "model.path") or "built-in policy",
        config_value(config, "algorithm.preset"),
        config_value(config, "runtime") and f"runtime={config_value(config, 'runtime')}",
    ]
    seed = config_value(config, "seed")
    return ", ".join([str(p) for p in parts if p] + ([] if seed is None else [f"seed {seed}"]))


def _tile(label: str, value: str, note: str = "", *, good: bool = True) -> dict[str, Any]:
    return {"label": label, "value": value, "note": note, "good": good}


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _reward(history: History, summary: Mapping[str, Any]) -> dict[str, Any]:
    held_out = _first(summary.get("eval_reward_final"), history.last("eval/reward_mean"))
    sampled = _first(summary.get("reward_final"), history.mean("reward/mean", last_fraction=0.1))
    note = "" if sampled is None else f"{number(sampled)} when sampling, last tenth of the steps"
    if held_out is None:
        return _tile("reward", number(sampled), "last tenth of the steps, when sampling")
    return _tile("held-out reward", number(held_out), note)


def _progress(
    history: History, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, Any]:
    steps = int(_first(summary.get("steps"), history.last("step")) or 0)
    seconds = _first(summary.get("seconds"), history.last("time_s")) or 0.0
    startup, wanted = summary.get("startup_seconds"), config_value(config, "run.steps")
    notes = [f"{duration(seconds)} of training"]
    if startup is not None:
        notes.append(f"{startup:.1f} s to start")
    if summary.get("skipped_steps"):
        notes.append(f"{summary['skipped_steps']} skipped")
    of = f" of {wanted:,}" if isinstance(wanted, int) else ""
    return _tile("steps", f"{steps:,}{of}", ", ".join(notes))


def _staleness(
    history: History, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, Any]:
    counts = history.staleness_counts()
    observed = max(counts, default=None)
    if observed is None:
        observed = summary.get("staleness_observed_max")
    bound = config_value(config, "staleness.max")
    if observed is None:
        return _tile("largest staleness", "none yet", f"the bound is {bound}")
    tokens = sum(counts.values())
    mean = sum(lag * n for lag, n in counts.items()) / tokens if tokens else 0.0
    value = f"{observed}" if bound is None else f"{observed}, bound {bound}"
    kept = bound is None or observed <= bound
    return _tile("largest staleness", value, f"{mean:.2f} versions on average", good=kept)


def _throughput(history: History, summary: Mapping[str, Any]) -> dict[str, Any]:
    seconds, generated = summary.get("seconds"), summary.get("tokens_generated")
    rate = history.mean("throughput/generated_tokens_per_s")
    if seconds and generated:
        rate = generated / seconds
    trajectories = history.mean("throughput/trajectories_per_s")
    note = "" if trajectories is None else f"{number(trajectories)} trajectories/s"
    return _tile("tokens/s generated", "none yet" if rate is None else number(rate), note)
