"""What a run's folder holds, read for the report; files that are absent or torn are passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from skyrl_async.checkpoint import CHECKPOINTS, MANIFEST, checkpoints_in
from skyrl_async.config_keys import KEYS, default_of, show
from skyrl_async.metrics.samples import read_samples

MAX_SAMPLE_STEPS = 8
"""Steps whose trajectories are shown."""

MAX_SAMPLE_TOKENS = 24_000
"""Of all trajectories that are shown."""

_GUARD = re.compile(r"step (\d+): collapse guard: (.+?), because of (.+)$")
_MAX_LOG_BYTES = 8 << 20


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run."""
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file, empty if there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def config_value(config: Mapping[str, Any], dotted: str) -> Any:
    """Return the value of a dotted key, None if it is absent."""
    found: Any = config
    for part in dotted.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def config_rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every key of a resolved configuration, with its default where that is another.

    Keys that this version does not know come last.
    """
    rows = []
    given = dict(_flat(config))
    for key, field in KEYS.items():
        if key not in given:
            continue
        value, default = given.pop(key), default_of(field)
        changed = _plain(value) != _plain(default)
        rows.append(
            {
                "key": key,
                "value": show(value),
                "default": show(_plain(default)) if changed else None,
                "meaning": field.description or "",
            }
        )
    unknown = "unknown to this version"
    rows += [
        {"key": key, "value": show(value), "default": unknown, "meaning": ""}
        for key, value in given.items()
    ]
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in KEYS:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def checkpoint_rows(folder: Path) -> list[dict[str, Any]]:
    """Return step, policy version, bytes and time of every checkpoint that is there."""
    rows = []
    for path in checkpoints_in(folder / CHECKPOINTS):
        manifest = read_mapping(path / MANIFEST)
        files = manifest.get("files")
        rows.append(
            {
                "name": path.name,
                "step": manifest.get("step"),
                "policy_version": manifest.get("policy_version"),
                "size_bytes": sum(files.values()) if isinstance(files, dict) else None,
                "written_at": manifest.get("written_at"),
            }
        )
    return rows


def guard_causes(folder: Path) -> dict[tuple[int, str], str]:
    """Return why the collapse guard acted, by step and action, as the log says it."""
    causes: dict[tuple[int, str], str] = {}
    try:
        with open(folder / "run.log", "rb") as log:
            text = log.read(_MAX_LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return causes
    for line in text.splitlines():
        if (found := _GUARD.search(line)) is not None:
            causes[int(found[1]), found[2]] = found[3]
    return causes


def shown_samples(folder: Path) -> list[dict[str, Any]]:
    """Return trajectories of a few steps spread over the run, the first and the last among them."""
    by_version: dict[int, list[dict[str, Any]]] = {}
    for sample in read_samples(folder / "samples.jsonl"):
        by_version.setdefault(sample["train_version"], []).append(sample)
    versions = sorted(by_version)
    count = min(MAX_SAMPLE_STEPS, len(versions))
    # From the newest on, so that it is there even if trajectories are long.
    wanted = [versions[round(i * (len(versions) - 1) / max(1, count - 1))] for i in range(count)]
    chosen: list[dict[str, Any]] = []
    room = MAX_SAMPLE_TOKENS
    for version in reversed(wanted):
        for sample in by_version[version]:
            room -= len(sample.get("texts", ()))
            if room >= 0 or not chosen:
                chosen.append(sample)
    return sorted(chosen, key=lambda sample: sample["train_version"])
