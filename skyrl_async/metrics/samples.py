"""``samples.jsonl``: trajectories as they were trained, one JSON object a line, of bounded size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
"""Of the file; beyond it, every second of its steps goes."""


class SampleWriter:
    """Appends the samples of a step; each line is in the file at once.

    Args:
        path: file to write.
        resume_version: policy version from which a run goes on: lines of later steps, and a last
            one that was cut off, are removed.
        max_bytes: size at which the file is thinned. Recent steps stay closer together than early
            ones, because those were thinned more often.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_version: int = 0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        if self.path.exists():
            self._rewrite(s for s in read_samples(self.path) if _version(s) < resume_version)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, each with its ``train_version``.

        Raises:
            OSError: if they cannot be written.
        """
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            size_bytes = file.tell()
        if size_bytes > self._max_bytes:
            self._thin()

    def _thin(self) -> None:
        samples = list(read_samples(self.path))
        versions = sorted({_version(sample) for sample in samples})
        kept = set(versions[::2])
        self._rewrite(sample for sample in samples if _version(sample) in kept)

    def _rewrite(self, samples: Iterable[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        lines = [json.dumps(sample, allow_nan=False) + "\n" for sample in samples]
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self.path)


def read_samples(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a file up to the first line that is not whole; none without a file."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                sample = json.loads(line)
            except ValueError:
                return
            if not line.endswith("\n") or not isinstance(sample, dict):
                return
            if not isinstance(sample.get("train_version"), int):
                return
            yield sample


def _version(sample: Mapping[str, Any]) -> int:
    return int(sample["train_version"])
