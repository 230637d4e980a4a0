"""Pictures are written for whatever a sweep has, and are the same for the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skyrl_async.sweep.rows import Row
from skyrl_async.sweep.statistics import summarize

pytest.importorskip("matplotlib")

from skyrl_async.sweep.pictures import by_lag, by_step, draw_all

STEPS = 20
ROW = Row(
    digest="d",
    cell={"method": "grpo", "lag": 0, "seed": 0},
    status="finished",
    config={"run": {"steps": STEPS}},
    seconds=2.0,
    reward=0.5,
    reward_final=0.4,
    series={
        "step": list(range(1, STEPS + 1)),
        "time_s": [0.1 * i for i in range(1, STEPS + 1)],
        "reward/mean": [i / STEPS for i in range(STEPS)],
        "offpolicy/ess_fraction": [1.0] * STEPS,
        "offpolicy/kl_behavior": [0.1] * STEPS,
    },
    summary={},
)


def grid() -> list[Row]:
    return [
        replace(ROW, cell={"method": method, "lag": lag, "seed": seed}, reward=0.5 + seed / 10)
        for method in ("grpo", "m2po")
        for lag in (0, 8)
        for seed in (0, 1)
    ]


def test_every_picture_is_written_as_png_and_svg(tmp_path: Path):
    rows = grid()
    files = draw_all(rows, summarize(rows), tmp_path, lags=(0, 8, 64))
    names = {file.name for file in files}
    stems = {
        *("reward_by_step_lag_0", "reward_by_step_lag_8", "reward_by_second_lag_0"),
        *("reward_by_second_lag_8", "reward_by_lag", "ess_by_lag", "kl_by_lag"),
    }
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files if file.suffix == ".png")


def test_the_same_rows_give_the_same_files(tmp_path: Path):
    rows = grid()
    first = draw_all(rows, summarize(rows), tmp_path / "a", lags=(0,))
    again = draw_all(rows, summarize(rows), tmp_path / "b", lags=(0,))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_lines_are_means_and_methods_that_collapsed_are_crossed_out():
    lost = [0.8] * 10 + [0.1] * 10
    rows = [
        replace(row, series={**row.series, "reward/mean": lost})
        if row.cell["method"] == "m2po" and row.cell["lag"] == 8
        else row
        for row in grid()
    ]
    axes = by_lag(summarize(rows), lambda s: s.reward, label="reward").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    # Lags are as far apart as their number in the list says, methods side by side.
    assert lines["grpo"].get_xydata().tolist() == [[-0.15, 0.55], [0.85, 0.55]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "8"]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[1.15, 0.55]]]


def test_longer_runs_are_lines_of_their_own_and_not_in_curves_of_shorter_ones():
    longer = {
        name: [value for value in values for _ in range(2)] for name, values in ROW.series.items()
    }
    long_row = replace(
        ROW,
        cell={"method": "long", "lag": 0, "seed": 0},
        config={"run": {"steps": 2 * STEPS}},
        series=longer,
    )
    rows = [*grid(), long_row]
    axes = by_lag(summarize(rows), lambda s: s.reward, label="reward").axes[0]
    assert "long, 40 steps" in {line.get_label() for line in axes.lines}
    curves = by_step([r for r in rows if r.cell["lag"] == 0], title="").axes[0].lines
    assert {line.get_label() for line in curves} == {"grpo", "m2po"}
