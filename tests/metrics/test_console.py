import io
import logging
import threading

import pytest
from rich.console import Console

from skyrl_async.metrics.console import ConsoleSink, pause_s

_METRICS = {"reward/mean": 0.5, "staleness/max": 1}


class FakeClock:
    """Seconds that only go on when told."""

    def __init__(self):
        self.now = 10.0

    def __call__(self):
        return self.now


class WatchedFile(io.StringIO):
    """Sets ``seen`` once ``text`` was written."""

    def __init__(self, text):
        super().__init__()
        self.text = text
        self.seen = threading.Event()

    def write(self, text):
        written = super().write(text)
        if self.text in self.getvalue():
            self.seen.set()
        return written


class BrokenFile(io.StringIO):
    """A terminal that went away."""

    def write(self, text):
        raise OSError("gone")


@pytest.fixture
def clock():
    return FakeClock()


def _plain(clock, **options):
    file = io.StringIO()
    console = Console(file=file, width=80)
    options = {"run_name": "run", "steps": 100, "plain_interval_s": 10.0, **options}
    return ConsoleSink("plain", console=console, clock=clock, **options), file


def _live(file, **options):
    console = Console(file=file, force_terminal=True, width=80, height=24)
    return ConsoleSink("live", run_name="number_guess", steps=10, console=console, **options)


def test_plain_mode_prints_now_and_then_at_evaluations_and_at_the_end(clock):
    sink, file = _plain(clock, steps=6)
    for step in range(1, 7):
        metrics = {**_METRICS, "eval/reward_mean": 0.7 if step == 3 else None}
        sink.write(step, metrics=metrics, histograms={})
        clock.now += 4
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "6/6"]
    assert "eval 0.700" in lines[1]
    assert lines[2].endswith("  0:20")
    clock.now += 100
    sink.write(7, metrics=_METRICS, histograms={})
    assert file.getvalue().splitlines()[-1].startswith("step 7/6")


def test_plain_mode_has_no_escape_codes_and_names_startup_phases(clock):
    sink, file = _plain(clock)
    sink.status("starting Ray")
    clock.now += 65
    sink.status("loading policy")
    sink.update({"buffer/groups": 3})
    sink.write(1, metrics=_METRICS, histograms={})
    text = file.getvalue()
    assert text.splitlines()[:2] == ["0:00  starting Ray", "1:05  loading policy"]
    assert text.isascii()
    assert "\x1b" not in text


def test_time_left_follows_the_speed_of_the_latest_steps(clock):
    sink, file = _plain(clock, plain_interval_s=0.0)
    for step in range(1, 4):
        sink.write(step, metrics=_METRICS, histograms={})
        clock.now += 2
    assert file.getvalue().splitlines()[-1].endswith("0:04, 3:14 left")


def test_time_left_is_at_most_what_the_run_may_take(clock):
    sink, file = _plain(clock, plain_interval_s=0.0, max_seconds=60.0)
    clock.now += 20
    sink.write(1, metrics=_METRICS, histograms={})
    assert file.getvalue().splitlines()[-1].endswith("0:20, 0:40 left")


def test_finish_says_how_it_ended_and_where_to_look(clock, tmp_path):
    sink, file = _plain(clock)
    run_dir = tmp_path / "my run"
    (run_dir / "tensorboard").mkdir(parents=True)
    (run_dir / "trace").mkdir()
    summary = {
        "status": "finished",
        "steps": 100,
        "seconds": 112.4,
        "reward_final": 0.967,
        "eval_reward_final": None,
        "staleness_observed_max": 2,
        "staleness_configured_max": 2,
        "dropped": {"stale": 3, "shutdown": 0},
        "largest_waste": {"text": "the learner waits"},
    }
    sink.finish(summary, run_dir=run_dir)
    assert file.getvalue().splitlines() == [
        "finished after 100 steps in 1:52, reward 0.967, staleness at most 2 (bound 2), "
        "dropped 3 stale",
        "largest waste  the learner waits",
        f"run folder   '{run_dir}'",
        f"TensorBoard  tensorboard --logdir '{run_dir}'",
        f"timeline     python -m skyrl_async.timeline '{run_dir}'",
    ]


def test_off_prints_nothing(clock, tmp_path):
    file = io.StringIO()
    sink = ConsoleSink("off", run_name="run", console=Console(file=file), clock=clock)
    sink.status("starting Ray")
    sink.write(1, metrics=_METRICS, histograms={})
    sink.finish({}, run_dir=tmp_path)
    sink.close()
    assert file.getvalue() == ""


def test_live_mode_shows_a_phase_while_the_run_does_nothing():
    file = WatchedFile("loading policy")
    sink = _live(file)
    sink.status("loading policy")
    assert file.seen.wait(timeout=20)
    sink.close()


def test_live_mode_leaves_the_last_table_and_gives_the_cursor_back(tmp_path):
    file = io.StringIO()
    sink = _live(file, staleness_max=2, run_dir=tmp_path)
    sink.status("starting Ray")
    for step in range(1, 11):
        metrics = {**_METRICS, "reward/mean": step / 8}
        sink.write(step, metrics=metrics, histograms={"staleness/histogram": {0: 3, 1: 1}})
    sink.finish({"status": "finished"}, run_dir=tmp_path)
    text = file.getvalue()
    last_table = text[text.rindex("╭") :]
    assert "1.25" in last_table
    assert "max 1 of 2" in last_table
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "run folder" in text[text.rindex("╰") :]
    assert not [thread for thread in threading.enumerate() if thread.name == "console"]
    sink.close()


def test_a_terminal_that_went_away_turns_the_console_off_and_the_run_goes_on(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        sink = _live(BrokenFile())
        sink.status("starting Ray")
        sink.write(1, metrics=_METRICS, histograms={})
        sink.finish({}, run_dir=tmp_path)
        sink.close()
    assert sink.mode == "off"
    assert "the run goes on" in caplog.text


def test_a_value_that_cannot_be_shown_turns_the_console_off_and_ends_its_thread(caplog):
    file = io.StringIO()
    sink = _live(file)
    sink.write(1, metrics=_METRICS, histograms={})
    with caplog.at_level(logging.WARNING):
        sink.write(2, metrics={"reward/mean": "much"}, histograms={})
    assert sink.mode == "off"
    assert not [thread for thread in threading.enumerate() if thread.name == "console"]
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("terminal", "ci", "term", "mode"),
    [
        (True, "", "xterm", "live"),
        (True, "false", "xterm", "live"),
        (True, "true", "xterm", "plain"),
        (True, "", "dumb", "plain"),
        (False, "", "xterm", "plain"),
    ],
)
def test_auto_is_live_only_on_a_capable_terminal(monkeypatch, terminal, ci, term, mode):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", term)
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert ConsoleSink("auto", run_name="run", console=console).mode == mode


def test_auto_is_plain_where_the_terminal_cannot_show_blocks(monkeypatch):
    monkeypatch.setenv("CI", "")
    monkeypatch.setenv("TERM", "xterm")
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    console = Console(file=file, force_terminal=True)
    assert ConsoleSink("auto", run_name="run", console=console).mode == "plain"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="must be auto, live, plain or off, got 'loud'"):
        ConsoleSink("loud", run_name="run")


def test_drawing_takes_less_than_a_hundredth_of_a_core():
    for cost in (0.0001, 0.002, 0.007, 0.013):
        assert pause_s(cost) >= 0.25
        assert cost / (cost + pause_s(cost)) < 0.01
    assert pause_s(10.0) == 2.0
