import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from skyrl_async.metrics.dashboard import plain_line, render
from skyrl_async.metrics.formatting import duration, number, percent, short_time, size, sparkline
from skyrl_async.metrics.names import find
from skyrl_async.metrics.view import RunView, Trend

_STEP = {
    "reward/mean": 0.842,
    "reward/std": 0.21,
    "reward/trained_mean": 0.83,
    "policy/entropy": 1.2,
    "staleness/mean": 0.71,
    "staleness/p95": 2,
    "staleness/max": 2,
    "offpolicy/ess_fraction": 0.972,
    "offpolicy/importance_weight_mean": 1.0,
    "offpolicy/importance_weight_max": 1.91,
    "offpolicy/clip_fraction": 0.031,
    "throughput/generated_tokens_per_s": 12_431.0,
    "throughput/trained_tokens_per_s": 11_900.0,
    "throughput/trajectories_per_s": 312.4,
    "idle/learner/wait_batch_fraction": 0.12,
    "idle/learner/train_fraction": 0.88,
    "idle/engine/wait_requests_fraction": 0.04,
    "idle/engine/decode_fraction": 0.96,
    "policy_version": 40,
    "live_version": 39,
    "sync/stall_s": 0.0032,
    "buffer/groups": 12,
    "buffer/bytes": 1_234_567,
    "dropped/stale": 3,
}


def _view(*, steps=40, staleness_max=2):
    view = RunView("number_guess", steps=100, staleness_max=staleness_max, footer="look here")
    for step in range(1, steps + 1):
        metrics = {**_STEP, "reward/mean": 0.842 * step / steps, "dropped/stale": int(step == 9)}
        metrics["eval/reward_mean"] = 0.91 if step == 20 else None
        view.append(
            step, metrics=metrics, histograms={"staleness/histogram": {0: 60, 1: 30, 2: 10}}
        )
    view.elapsed_s, view.seconds_left = 72.0, 3708.0
    return view


def _lines(view, *, width):
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor"
    )
    console.print(render(view, width=width))
    assert "\x1b[" in console.file.getvalue()
    plain = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    plain.print(render(view, width=width))
    return plain.file.getvalue().splitlines()


def _row(lines, label):
    (row,) = [line for line in lines if line.startswith(f"│ {label} ")]
    return row


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_the_terminal_and_24_lines(width):
    lines = _lines(_view(), width=width)
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) <= 23
    frame = [cell_len(line) for line in lines[1:-1]]
    assert len(set(frame)) == 1


def test_the_table_says_what_the_run_does():
    lines = _lines(_view(), width=80)
    assert "number_guess" in lines[0]
    assert "step 40 of 100" in lines[0]
    assert "1:12, 1:01:48 left" in lines[0]
    assert "0.842" in _row(lines, "reward") and "▁" in _row(lines, "reward")
    assert "0.910" in _row(lines, "eval reward") and "at step 20" in _row(lines, "eval reward")
    assert "p95 2, max 2 of 2" in _row(lines, "staleness")
    assert "0 60% 1 30% 2 10%" in _row(lines, "tokens by age")
    assert "97%" in _row(lines, "ESS of weights") and "max 1.91" in _row(lines, "ESS of weights")
    assert "3.1%" in _row(lines, "clipped")
    assert "12.4k" in _row(lines, "tokens/s") and "trained 11.9k/s" in _row(lines, "tokens/s")
    assert "312" in _row(lines, "trajectories/s")
    assert "12%" in _row(lines, "learner idle") and "train 88" in _row(lines, "learner idle")
    assert "4.0%" in _row(lines, "engine idle")
    assert "engines at 39" in _row(lines, "version") and "stall 3.2 ms" in _row(lines, "version")
    assert "1.23 MB" in _row(lines, "buffer groups")
    assert "1 stale" in _row(lines, "dropped")
    assert lines[-1].strip() == "look here"


def test_bars_of_all_roles_are_as_wide_as_the_column_and_show_idle_time_apart():
    lines = _lines(_view(), width=120)
    for label, idle in (("learner idle", 0.12), ("engine idle", 0.04)):
        row = _row(lines, label)
        assert row.count("█") + row.count("░") == 40
        assert row.count("░") == round(40 * idle)


@pytest.mark.parametrize("largest", [2, 3])
def test_a_broken_bound_is_red(largest):
    view = _view()
    view.metrics["staleness/max"] = largest
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    console.print(render(view, width=80))
    (row,) = [line for line in console.file.getvalue().splitlines() if "p95 2" in line]
    assert ("\x1b[1;2;31mmax 3 of 2" in row) == (largest == 3)


@pytest.mark.parametrize("width", [1, 20, 40, 60])
def test_a_tiny_terminal_is_survived(width):
    assert _lines(_view(), width=width)
    view = RunView("a_very_long_run_name_" * 5)
    view.activity = ("loading a policy with a very long name" * 3, 2.0)
    assert _lines(view, width=width)


def test_startup_phases_are_listed_before_the_first_step():
    view = RunView("number_guess", steps=10)
    view.phases = [("starting Ray", 2.13)]
    view.activity = ("loading policy", 0.84)
    lines = _lines(view, width=80)
    assert len(lines) == 3
    assert "✓ starting Ray" in lines[1] and "2.1 s" in lines[1]
    assert "loading policy" in lines[2] and "0.8 s" in lines[2]


def test_an_activity_during_training_is_shown_below_the_table():
    view = _view()
    view.activity = ("evaluating", 3.2)
    assert "evaluating 3 s" in _lines(view, width=80)[-1]


def test_missing_values_are_dashes_and_values_that_are_not_finite_are_skipped():
    view = RunView("number_guess")
    view.append(1, metrics={"reward/mean": 1.0, "staleness/max": None}, histograms={})
    view.append(2, metrics={"reward/mean": math.nan}, histograms={})
    lines = _lines(view, width=80)
    assert "1.00" in _row(lines, "reward")
    assert "max -" in _row(lines, "staleness")


def test_the_plain_line_is_short_ascii():
    line = plain_line(_view())
    assert line.isascii()
    assert len(line) <= 140
    assert line == (
        "step 40/100  reward 0.842  eval 0.910  staleness 0.710 max 2/2  12.4k tok/s  "
        "idle learner 12% engine 4%  dropped 1  1:12, 1:01:48 left"
    )


class _Listening(dict):
    """Remembers which names are read."""

    def __init__(self, items):
        super().__init__(items)
        self.read = set()

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def test_every_metric_that_the_console_reads_is_in_the_table_of_names():
    view = _view()
    view.metrics = _Listening(view.metrics)
    render(view, width=80)
    plain_line(view)
    assert len(view.metrics.read) > 20
    assert not [name for name in view.metrics.read if find(name) is None]
    assert not [name for name in view.trends if find(name) is None]


def test_a_copy_of_the_view_does_not_change():
    view = _view()
    copy = view.copy()
    before = plain_line(copy), list(copy.trends["reward/mean"].means)
    view.append(41, metrics={"reward/mean": 9.0, "dropped/stale": 5}, histograms={})
    assert (plain_line(copy), copy.trends["reward/mean"].means) == before


def test_a_trend_keeps_the_whole_history_in_bounded_space():
    trend = Trend(capacity=8)
    for value in range(1000):
        trend.add(value)
    assert len(trend.means) < 16
    assert trend.means == sorted(trend.means)
    assert trend.means[0] < 64 and trend.means[-1] > 900


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (0, "0"),
        (0.0, "0"),
        (9999, "9999"),
        (0.00213, "0.00213"),
        (0.8421, "0.842"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.7, "1.00k"),
        (12_431.0, "12.4k"),
        (-2_500_000, "-2.50M"),
        (1.5e-9, "1.5e-09"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_other_values_have_units():
    assert [percent(v) for v in (None, 0.0, 0.031, 0.61, 1.0)] == ["-", "0%", "3.1%", "61%", "100%"]
    assert [size(v) for v in (None, 12, 1_234_567)] == ["-", "12.0 B", "1.23 MB"]
    assert [short_time(v) for v in (None, 0.0032, 2.0)] == ["-", "3.2 ms", "2.0 s"]
    assert [duration(v) for v in (0.9, 72, 3723)] == ["0:00", "1:12", "1:02:03"]


def test_a_sparkline_spans_its_values():
    assert sparkline([0, 7], width=10) == "▁█"
    assert sparkline([], width=10) == ""
    assert sparkline([3, 3, 3], width=10) == "▄▄▄"
    assert sparkline([0, 0], width=10, from_zero=True) == "▁▁"
    assert sparkline([0, 0, 10, 10], width=2) == "▁█"
    assert len(sparkline(range(1000), width=17)) == 17


def test_a_steady_number_is_a_flat_line_not_magnified_noise():
    steady = [100 + (i % 2) for i in range(10)]
    assert len(set(sparkline(steady, width=10, from_zero=True))) == 1
    assert len(set(sparkline(steady, width=10))) == 2
