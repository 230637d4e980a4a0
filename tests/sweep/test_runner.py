"""Sweeps of real runs: resumed, torn, failing, paused, and within their time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from skyrl_async.sweep.grid import Block, Cell, Sweep
from skyrl_async.sweep.rows import ROWS, read_rows
from skyrl_async.sweep.runner import CELLS, Limits, Outcome, Runner

SMALL = (
    *("runtime=local", "learner.groups_per_step=2", "rollout.group_size=2", "run.steps=2"),
    *("model.hidden_size=16", "model.num_heads=2", "model.num_layers=1"),
    *("evaluation.num_tasks=2", "environment.in_process=true", "sampling.max_tokens=1"),
)


def cells(**values: list[object]) -> tuple[Cell, ...]:
    return Sweep(blocks=(Block(values=values),), overrides=SMALL).cells()  # type: ignore[arg-type]


def run(
    grid: tuple[Cell, ...], folder: Path, *, retry_failed: bool = False, **limits: object
) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    runner = Runner(
        grid,
        config=None,
        folder=folder,
        limits=Limits(**limits),  # type: ignore[arg-type]
        retry_failed=retry_failed,
        commit="c0",
        report=lines.append,
    )
    return runner.run(), lines


def test_every_cell_becomes_a_row_and_is_not_run_again(tmp_path: Path):
    outcome, lines = run(cells(lag=[0, 1], seed=[3]), tmp_path)
    assert outcome == Outcome(total=2, finished=2, failed=0, left=0)
    assert [line.split(":")[0] for line in lines] == ["lag=0 seed=3", "lag=1 seed=3"]
    first, second = read_rows(tmp_path)
    assert (first.cell, second.cell) == ({"lag": 0, "seed": 3}, {"lag": 1, "seed": 3})
    assert (first.status, first.attempts, first.commit) == ("finished", 1, "c0")
    assert first.config["lab"]["exact_lag"] == 0
    assert second.series["staleness/max"] == [0, 1]
    assert first.reward == first.summary["eval_reward_final"]
    assert "seed=3" in first.command.split()
    assert list((tmp_path / CELLS).iterdir()) == []
    written = json.loads((tmp_path / ROWS).read_text().splitlines()[0])
    assert {len(values) for values in written["series"].values()} == {2}
    outcome, lines = run(cells(lag=[0, 1, 2], seed=[3]), tmp_path)
    assert (outcome.finished, len(lines)) == (3, 1)
    assert lines[0].startswith("lag=2")


def test_a_torn_cell_is_run_again_from_the_beginning(tmp_path: Path):
    grid = cells(seed=[1])
    run(grid, tmp_path, keep_runs=True)
    (kept,) = (tmp_path / CELLS).iterdir()
    assert (kept / "run" / "summary.json").exists()
    content = (tmp_path / ROWS).read_text()
    (tmp_path / ROWS).write_text(content[: len(content) // 2])
    outcome, lines = run(grid, tmp_path)
    assert (outcome.finished, len(lines)) == (1, 1)
    assert read_rows(tmp_path)[0].status == "finished"


def test_a_failure_is_tried_once_more_and_recorded_with_its_reason(tmp_path: Path):
    grid = cells(**{"environment.options": ["{max_guesses: 0}"], "seed": [0]})
    good = cells(seed=[0])
    outcome, lines = run((*grid, *good), tmp_path)
    assert outcome == Outcome(total=2, finished=1, failed=1, left=0)
    assert [line.endswith("once more") for line in lines] == [True, False, False]
    failed, finished = read_rows(tmp_path)
    assert (failed.status, failed.attempts, failed.reward) == ("failed", 2, None)
    assert failed.error is not None
    assert "max_guesses" in failed.error
    assert finished.status == "finished"
    assert run(grid, tmp_path)[1] == []
    assert len(run(grid, tmp_path, retry_failed=True)[1]) == 2


@pytest.mark.slow
def test_a_cell_that_takes_too_long_has_failed(tmp_path: Path):
    grid = cells(**{"run.steps": [100_000]})
    outcome, _ = run(grid, tmp_path, cell_timeout_s=2.0)
    assert outcome.failed == 1
    error = read_rows(tmp_path)[0].error
    assert error is not None
    assert "it took too long" in error


def test_when_the_time_is_over_the_rest_is_left_for_the_next_call(tmp_path: Path):
    started_s = time.monotonic()
    outcome, _ = run(cells(**{"run.steps": [100_000], "seed": [0, 1]}), tmp_path, max_seconds=1.0)
    assert time.monotonic() - started_s < 10
    assert outcome == Outcome(total=2, finished=0, failed=0, left=2)
    assert read_rows(tmp_path) == []


def test_no_cell_is_started_while_the_file_exists(tmp_path: Path):
    pause = tmp_path / "busy"
    pause.touch()
    outcome, lines = run(cells(seed=[0]), tmp_path / "s", pause_while=pause, max_seconds=0.3)
    assert (outcome.left, lines) == (1, [])
    assert list((tmp_path / "s" / CELLS).iterdir()) == []
    pause.unlink()
    assert run(cells(seed=[0]), tmp_path / "s", pause_while=pause)[0].finished == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("jobs", 0, "jobs must be in 1"), ("jobs", 10_000, "cores"), ("max_seconds", 0, "> 0")],
)
def test_limits_out_of_range_are_refused(name: str, value: float, words: str):
    with pytest.raises(ValueError, match=words):
        Limits(**{name: value})  # type: ignore[arg-type]
