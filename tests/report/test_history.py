"""Buckets of steps against plain loops over all; files that grow, tear and are replaced."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.report.history import MAX_BUCKETS, History, MetricsFile, bin_edges

VALUES = st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-5, 5))


def history_of(values, name="m"):
    history = History()
    history.extend([{"step": i + 1, "time_s": i / 2, name: v} for i, v in enumerate(values)])
    return history


def four_digits(value):
    return float(f"{value:.4g}")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=40), st.sampled_from([1, MAX_BUCKETS, MAX_BUCKETS + 1])
)
def test_buckets_are_mean_least_and_largest_of_their_steps(values, repeats):
    values = values * (repeats // len(values) + 1)
    history = history_of(values)
    series = history.series()
    stride = series["stride"]
    assert stride == 1 or len(values) > MAX_BUCKETS * stride // 2
    assert math.ceil(len(values) / stride) <= MAX_BUCKETS
    data = series["values"].get("m", {"mean": [None] * math.ceil(len(values) / stride)})
    for bucket, start in enumerate(range(0, len(values), stride)):
        known = [v for v in values[start : start + stride] if v is not None]
        if not known:
            assert data["mean"][bucket] is None
            continue
        mean = sum(known) / len(known)
        assert data["mean"][bucket] == pytest.approx(four_digits(mean), rel=1e-3, abs=1e-6)
        for part, best in (("low", min), ("high", max)):
            assert data.get(part, data["mean"])[bucket] == pytest.approx(
                four_digits(best(known)), rel=1e-3, abs=1e-6
            )
        assert series["values"]["step"]["mean"][bucket] == min(start + stride, len(values))


def test_a_page_that_has_the_full_buckets_gets_only_the_rest():
    history = history_of([float(i) for i in range(3 * MAX_BUCKETS)])
    whole, rest = history.series(), history.series(first_bucket=10)
    assert rest["first"] == 10
    for name, data in rest["values"].items():
        for part, numbers in data.items():
            assert numbers == whole["values"][name][part][10:]


def test_full_buckets_do_not_change_while_the_stride_stays():
    values = [math.sin(i) for i in range(4 * MAX_BUCKETS)]
    before, after = history_of(values[: 3 * MAX_BUCKETS]), history_of(values)
    assert before.stride == after.stride == 4
    full = before.num_rows // 4
    old, new = (h.series()["values"]["m"]["mean"] for h in (before, after))
    assert old[:full] == new[:full]


def test_time_shares_weigh_steps_by_their_seconds():
    history = History()
    rows = [(1.0, 1.0), (4.0, 0.0)]  # one second of work, then three of waiting
    for step, (time_s, work) in enumerate(rows, start=1):
        idle = {"idle/learner/train_fraction": work, "idle/learner/wait_fraction": 1 - work}
        history.extend([{"step": step, "time_s": time_s, **idle}])
    assert history.time_shares("learner") == {"train": 0.25, "wait": 0.75}
    assert history.time_shares("engine") == {}


def test_staleness_is_counted_by_token_over_the_run_and_by_bucket():
    history = History()
    history.extend(
        [
            {"step": 1, "staleness/histogram": {"0": 30}},
            {"step": 2, "staleness/histogram": {"0": 10, "2": 30}},
            {"step": 3},
        ]
    )
    found = history.staleness()
    assert found["labels"] == ["0", "1", "2"]
    assert found["tokens"] == [40, 0, 30]
    assert found["shares"] == [[1, 0, 0], [0.25, 0, 0.75], [0, 0, 0]]
    assert history.staleness_counts() == {0: 40, 2: 30}


@given(st.integers(-1, 2000), st.integers(2, 20))
def test_bins_cover_every_lag_once(largest, max_bins):
    edges = bin_edges(largest, max_bins=max_bins)
    assert edges[0] == 0 and edges[-1] == largest + 1
    assert all(low < high for low, high in pairwise(edges))
    assert len(edges) - 1 <= max(max_bins, 1)


def test_the_file_is_read_as_it_grows_and_a_torn_line_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    reader = MetricsFile(path)
    assert reader.poll().num_rows == 0
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert reader.poll().num_rows == 1
    with path.open("a") as file:
        file.write(': 5}\nnot json\n{"step": 3, "b": 7}\n')
    history = reader.poll()
    assert history.num_rows == 3
    assert history.series()["values"]["a"]["mean"] == [1, 5, None]
    assert history.series()["values"]["b"]["mean"] == [None, None, 7]
    assert history.last("a") == 5 and history.last("c") is None
    assert history.last_row() == {"step": 3, "a": None, "b": 7}


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_was_cut_or_replaced_is_read_anew(tmp_path: Path, replace):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)))
    reader = MetricsFile(path)
    assert reader.poll().num_rows == 5
    target = tmp_path / "new" if replace else path
    rows = 7 if replace else 2
    target.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, rows + 1)))
    target.rename(path)
    assert reader.poll().num_rows == rows


def test_lines_longer_than_what_is_read_at_once_are_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("skyrl_async.report.history._CHUNK_BYTES", 16)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "a_long_name": i * 1.5} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert MetricsFile(path).poll().series()["values"]["a_long_name"]["mean"] == [
        row["a_long_name"] for row in rows
    ]
