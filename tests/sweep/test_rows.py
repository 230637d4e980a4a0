"""Rows survive a sweep that is killed while it writes one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skyrl_async.sweep.rows import ROWS, Row, append_row, read_rows, read_series, thinned

ROW = Row(
    digest="d0",
    cell={"method": "grpo", "lag": 8, "seed": 0},
    status="finished",
    config={"run": {"steps": 2}},
    reward=0.5,
    series={"step": [1, 2], "reward/mean": [0.25, None]},
    summary={"status": "finished"},
)


def test_what_is_written_is_read_again(tmp_path: Path):
    other = replace(ROW, digest="d1", status="failed", error="it took too long", reward=None)
    append_row(tmp_path, ROW)
    append_row(tmp_path, other)
    assert read_rows(tmp_path) == [ROW, other]
    assert read_rows(tmp_path / ROWS) == [ROW, other]


def test_without_a_file_there_are_no_rows(tmp_path: Path):
    assert read_rows(tmp_path) == []


def test_a_torn_line_is_left_out_and_cut_off_before_the_next(tmp_path: Path):
    append_row(tmp_path, ROW)
    with open(tmp_path / ROWS, "a") as file:
        file.write(ROW.to_json()[:40])
    assert read_rows(tmp_path) == [ROW]
    other = replace(ROW, digest="d1")
    append_row(tmp_path, other)
    assert read_rows(tmp_path) == [ROW, other]


def test_the_last_row_of_a_run_counts(tmp_path: Path):
    append_row(tmp_path, replace(ROW, status="failed", error="x"))
    append_row(tmp_path, ROW)
    assert read_rows(tmp_path) == [ROW]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path):
    (tmp_path / ROWS).write_text('{"digest": 1\n' + ROW.to_json() + "\n")
    with pytest.raises(ValueError, match="line 1: no row of a sweep"):
        read_rows(tmp_path)


def test_series_are_aligned_with_the_steps(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "reward/mean": 0.123456789}\n{"step": 2, "time_s": 0.5}\n')
    series = read_series(metrics)
    assert (series["step"], series["reward/mean"]) == ([1, 2], [0.12346, None])
    assert series["time_s"] == [None, 0.5]
    assert read_series(tmp_path / "missing") == {}


def test_thinned_series_keep_means_and_the_last_step():
    series = {"step": [1, 2, 3, 4, 5], "reward/mean": [0.0, 1.0, None, None, 0.5]}
    row = thinned(replace(ROW, series=series), every=2)
    assert row.series == {"step": [2, 4, 5], "reward/mean": [0.5, None, 0.5]}
    with pytest.raises(ValueError, match="every must be >= 1"):
        thinned(ROW, every=0)
