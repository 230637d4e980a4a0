"""What the page of a run shows, as one mapping of JSON values; how it is drawn is in ``assets``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_async.metrics.names import METRICS, is_idle_part
from skyrl_async.report.headline import headline, largest_waste_text
from skyrl_async.report.history import STALENESS, History, MetricsFile
from skyrl_async.report.run_files import (
    checkpoint_rows,
    config_rows,
    config_value,
    guard_causes,
    read_mapping,
    shown_samples,
)
from skyrl_async.report.timeline_excerpt import timeline_excerpt
from skyrl_async.report.wording import DROPS, ROLES

SECTIONS = {
    "train": "Learning",
    "fine-tuning": "Fine-tuning",
    "off-policy": "How far the data is from the policy",
    "staleness": "Staleness",
    "throughput": "Throughput",
    "sync": "Publishing weights",
    "buffer": "Replay buffer",
}
"""Titles of the sections of the table of metrics that are drawn as lines."""

_LOST_TOKENS = "dropped/generated_tokens"
"""Named like a reason to drop groups, and none."""

_FROM_ZERO = ("fraction", "1/s", "versions", "s", "bytes", "nats", "tokens")
"""Units that are drawn from 0 on."""

_SLOW_PARTS_EVERY_S = 5.0
"""Between two looks at what costs more than the newest lines: trajectories and the timeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a page has already, so that it need not be sent again.

    Attributes:
        stride: of its lines; 0 for a page that has none.
        buckets: full ones.
        parts: number of the slow parts, by :attr:`RunContent.parts`.

    Raises:
        ValueError: if a number is negative.
    """

    stride: int = 0
    buckets: int = 0
    parts: int = 0

    def __post_init__(self) -> None:
        if min(self.stride, self.buckets, self.parts) < 0:
            raise ValueError(f"what a page has is counted from 0, got {self}")


class RunContent:
    """Reads a run's folder again and again, and says what its page shows.

    Args:
        folder: of the run.

    Attributes:
        parts: counts the changes of trajectories, timeline and configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = 0
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._slow: dict[str, Any] = {}
        self._slow_key: Any = None
        self._slow_due_s = 0.0

    def poll(self) -> None:
        """Read what was added to the metrics, so that the next page has less to wait for."""
        self._metrics.poll()

    def read(self, known: Known | None = None, *, slow_parts: bool = True) -> dict[str, Any]:
        """Return what the page shows now.

        Args:
            known: by a page that is there already; without it, everything is returned.
            slow_parts: whether to wait for trajectories and timeline; a page without them gets them
                with its first news.
        """
        known = known or Known()
        config = read_mapping(self.folder / "config.yaml")
        # Before the metrics, which a finished run writes first: so its last steps are never missed.
        summary = read_mapping(self.folder / "summary.json")
        history = self._metrics.poll()
        if slow_parts:
            self._read_slow_parts(config, finished=bool(summary))
        same_buckets = known.stride == history.stride
        content = {
            "kind": "run",
            "name": config_value(config, "run.name") or self.folder.name,
            "folder": str(self.folder),
            "parts": self.parts if slow_parts else 0,
            **headline(history, config=config, summary=summary),
            "waste": largest_waste_text(history, config=config, summary=summary),
            "charts": chart_specs(history),
            "series": history.series(first_bucket=known.buckets if same_buckets else 0),
            "staleness": history.staleness(),
            "idle": idle_shares(history, summary=summary),
            "dropped": dropped_rows(history, summary=summary),
            "guard": guard_rows(history, guard_causes(self.folder)),
            "checkpoints": checkpoint_rows(self.folder),
        }
        return {**content, **self._slow} if slow_parts and known.parts != self.parts else content

    def newest(self) -> tuple[dict[str, float | None], dict[str, dict[int, int]], float | None]:
        """Return the last step's metrics, all steps' histograms, and when it was written (Unix)."""
        history = self._metrics.poll()
        try:
            written_s = (self.folder / "metrics.jsonl").stat().st_mtime
        except OSError:
            written_s = None
        counts = history.staleness_counts()
        return history.last_row(), {STALENESS: counts} if counts else {}, written_s

    def _read_slow_parts(self, config: Mapping[str, Any], *, finished: bool) -> None:
        now = time.monotonic()
        if now < self._slow_due_s:
            return
        self._slow_due_s = now + _SLOW_PARTS_EVERY_S
        files = [self.folder / "samples.jsonl", self.folder / "config.yaml"]
        sizes = [p.stat().st_size if p.is_file() else None for p in files]
        # The excerpt is of the middle of the run; while it goes on, a look now and then is enough.
        doublings = self._metrics.history.num_rows.bit_length()
        key = (*sizes, finished, doublings)
        if key == self._slow_key:
            return
        self._slow_key = key
        self.parts += 1
        self._slow = {
            "samples": shown_samples(self.folder),
            "config": config_rows(config),
            "timeline": timeline_excerpt(self.folder, self._metrics.history),
        }


def chart_specs(history: History) -> list[dict[str, Any]]:
    """Return the charts of lines: section, title, unit, whether from 0 on, and the metrics."""
    names = history.names
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    shown: set[str] = set()
    for metric in METRICS:
        found = [name for name in names if re.match(metric.pattern, name)]
        found = [name for name in found if name != _LOST_TOKENS]
        if metric.section == "idle" or not found:
            shown.update(found)
            continue
        if not metric.chart or metric.section not in SECTIONS:
            continue
        if metric.unit == "" and not any(history.nonzero_steps(name) for name in found):
            continue
        shown.update(found)
        title = "dropped groups" if metric.chart == "dropped" else metric.chart
        chart = charts.setdefault(
            (metric.section, title),
            {
                "section": SECTIONS[metric.section],
                "title": title,
                "unit": metric.unit,
                "from_zero": metric.unit in _FROM_ZERO,
                "lines": [],
            },
        )
        chart["lines"] += [
            {"name": n, "label": label_of(n), "meaning": metric.meaning} for n in found
        ]
    for chart in charts.values():
        shorten(chart["lines"])
    others = [name for name in names if name not in shown and name not in ("step", "time_s")]
    return [*charts.values(), *(_other_chart(name) for name in others)]


def _other_chart(name: str) -> dict[str, Any]:
    unit = next(
        (u for end, u in (("_s", "s"), ("_fraction", "fraction")) if name.endswith(end)), ""
    )
    line = {"name": name, "label": label_of(name), "meaning": ""}
    return {
        "section": "Everything else",
        "title": name,
        "unit": unit,
        "from_zero": unit in _FROM_ZERO,
        "lines": [line],
    }


def label_of(name: str) -> str:
    """Return a label for the line of a metric."""
    first, _, rest = name.partition("/")
    words = (rest.rpartition("/")[2] or first).replace("_", " ")
    words = words.removesuffix(" per s").removesuffix(" fraction")
    return f"held-out {words}" if first == "eval" else words


def shorten(lines: list[dict[str, Any]]) -> None:
    """Take away the words that the labels of all lines begin with, if there are several."""
    words = [line["label"].split() for line in lines]
    while len(words) > 1 and all(len(w) > 1 and w[0] == words[0][0] for w in words):
        words = [w[1:] for w in words]
    for line, kept in zip(lines, words, strict=True):
        line["label"] = " ".join(kept)


def idle_shares(history: History, *, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return where the wall time of each role went in the whole run, and the metrics behind it."""
    given = summary.get("idle") or {}
    rows = []
    for role, meaning in ROLES.items():
        shares = given.get(role) or history.time_shares(role)
        # What takes no time would only take a color.
        parts = [
            {
                "part": part,
                "share": round(share, 4),
                "name": f"idle/{role}/{part}_fraction",
                "waste": is_idle_part(part),
            }
            for part, share in shares.items()
            if share
        ]
        if parts:
            rows.append({"role": role, "meaning": meaning, "parts": parts})
    return rows


def dropped_rows(history: History, *, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how many groups were dropped for each reason, what it means and what helps."""
    counts = summary.get("dropped")
    if counts is None:
        totals = {reason.value: history.total(f"dropped/{reason.value}") for reason in DROPS}
        counts = {reason: int(n) for reason, n in totals.items() if n}
    wording = {reason.value: words for reason, words in DROPS.items()}
    rows = []
    for reason, number in sorted(counts.items(), key=lambda item: -item[1]):
        meaning, remedy = wording.get(reason, ("", ""))
        rows.append({"reason": reason, "groups": number, "meaning": meaning, "remedy": remedy})
    return rows


def guard_rows(history: History, causes: Mapping[tuple[int, str], str]) -> list[dict[str, Any]]:
    """Return the actions of the collapse guard with the steps in whose metrics they are."""
    rows = []
    for name in history.names:
        if name.startswith("guard/"):
            action = name.removeprefix("guard/")
            for step in history.nonzero_steps(name):
                words = action.replace("_", " ")
                # An action is decided after a step, and written with the next one.
                cause = causes.get((step - 1, words)) or causes.get((step, words), "")
                rows.append({"step": step, "action": words, "cause": cause})
    return sorted(rows, key=lambda row: row["step"])
