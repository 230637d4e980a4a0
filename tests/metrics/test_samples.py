"""The file of trajectories: whole lines, no future after a resume, never beyond its size."""

import json
from pathlib import Path

from skyrl_async.metrics.samples import SampleWriter, read_samples


def record(version: int, *, text: str = "") -> dict:
    return {"train_version": version, "text": text}


def versions(path: Path) -> list[int]:
    return [sample["train_version"] for sample in read_samples(path)]


def test_samples_are_read_back_up_to_a_torn_line(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    assert versions(path) == []
    SampleWriter(path).write([record(0, text="</script>\n☃"), record(0)])
    with path.open("a") as file:
        file.write('{"train_version": 1')
    assert next(read_samples(path))["text"] == "</script>\n☃"
    assert versions(path) == [0, 0]


def test_a_resumed_run_forgets_what_it_trains_again(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    writer = SampleWriter(path)
    for version in (0, 20, 40, 60):
        writer.write([record(version)])
    with path.open("a") as file:
        file.write('{"train_version": 80, "te')
    again = SampleWriter(path, resume_version=40)
    assert versions(path) == [0, 20]
    again.write([record(40)])
    assert versions(path) == [0, 20, 40]


def test_a_file_that_grows_too_large_loses_every_second_step_and_keeps_the_ends(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    line = len(json.dumps(record(100, text="x" * 80))) + 1
    writer = SampleWriter(path, max_bytes=20 * line)
    for version in range(200):
        writer.write([record(version, text="x" * 80)])
        assert path.stat().st_size <= 20 * line
    kept = versions(path)
    assert kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == 199
    assert len(kept) > 10
