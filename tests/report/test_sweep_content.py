"""The page of a sweep: means over seeds at every place of the swept axis."""

from pathlib import Path

import pytest

from skyrl_async.report.sweep_content import axes_of, sweep_content
from skyrl_async.report.writing import write_report
from skyrl_async.sweep.rows import Row, append_row


def row(reward: float | None, **cell) -> Row:
    return Row(
        digest=f"{sorted(cell.items())}",
        cell=cell,
        status="failed" if reward is None else "finished",
        error="boom" if reward is None else None,
        config={"run": {"steps": 2}},
        seconds=1.0,
        total_seconds=2.0,
        reward=reward,
        reward_final=reward,
        series={"step": [1, 2], "reward/mean": [0.0, reward], "offpolicy/ess_fraction": [1.0, 0.5]},
        summary={},
    )


def sweep(folder: Path, rows: list[Row]) -> dict:
    folder.mkdir()
    for one in rows:
        append_row(folder, one)
    return sweep_content(folder)


def test_the_lag_is_the_axis_and_methods_are_lines(tmp_path):
    pytest.importorskip("scipy")
    rewards = {("a", 0): (0.9, 1.0, 0.8), ("a", 8): (0.1, 0.3, 0.2), ("b", 0): (0.5, 0.5, 0.5)}
    rows = [
        row(r, method=method, lag=lag, seed=seed)
        for (method, lag), values in rewards.items()
        for seed, r in enumerate(values)
    ]
    content = sweep(tmp_path / "s", rows)
    assert (content["axis"], content["labels"], content["lines_are"]) == (
        "lag",
        ["0", "8"],
        "method",
    )
    lines = {line["label"]: line["data"] for line in content["against_axis"][0]["lines"]}
    assert lines["a"]["mean"] == [0.9, 0.2]
    # Student's t of 2 degrees of freedom is 4.3027 at 97.5 %; the deviation is 0.1.
    half = 4.3027 * 0.1 / 3**0.5
    assert lines["a"]["high"][0] - lines["a"]["mean"][0] == pytest.approx(half, abs=1e-3)
    assert lines["b"]["mean"] == [0.5, None]
    over_steps = content["over_steps"][1]["lines"]
    assert [(line["label"], line["data"]["mean"]) for line in over_steps] == [("a", [0.0, 0.2])]


def test_failed_runs_are_told_and_in_no_mean(tmp_path):
    rows = [row(0.5, lag=1, seed=0), row(None, lag=1, seed=1)]
    content = sweep(tmp_path / "s", rows)
    assert content["cells"] == [
        {"line": "all runs", "x": "None", "mean": 0.5, "low": 0.5, "high": 0.5}
        | {"seeds": 1, "collapsed": 0, "failed": 1}
    ]
    assert content["failed"] == [{"cell": "lag 1, seed 1", "error": "boom", "attempts": 1}]


def test_without_a_lag_the_last_axis_of_numbers_is_taken():
    rows = [
        row(0.1, rate=rate, size=size, method=m) for rate in (1, 2) for size in (3, 4) for m in "ab"
    ]
    assert axes_of(rows) == ("size", ["rate", "method"])
    assert axes_of([row(0.1, method=m) for m in "ab"]) == (None, ["method"])
    assert axes_of([row(0.1, method="a", seed=s) for s in (0, 1)]) == (None, [])


def test_a_sweep_without_rows_is_refused_and_one_with_rows_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished run of a sweep yet"):
        write_report(tmp_path)
    append_row(tmp_path, row(0.5, lag=1, method="</script>"))
    assert "</script>:" not in write_report(tmp_path).read_text()
