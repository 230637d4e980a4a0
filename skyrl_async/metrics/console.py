"""The console of a run: a live table on a terminal, otherwise now and then a plain line."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from rich.console import Console, RenderableType
from rich.live import Live

from skyrl_async.metrics.dashboard import plain_line, render
from skyrl_async.metrics.formatting import duration, number
from skyrl_async.metrics.recorder import Histograms, Scalars
from skyrl_async.metrics.view import RunView

Mode = Literal["auto", "live", "plain", "off"]

_SHORTEST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 2.0
_PAUSE_OVER_COST = 150
_ETA_STEPS = 50

_logger = logging.getLogger(__name__)
_Arguments = ParamSpec("_Arguments")


def _never_raises(
    method: Callable[Concatenate[ConsoleSink, _Arguments], None],
) -> Callable[Concatenate[ConsoleSink, _Arguments], None]:
    """Make a method of ``ConsoleSink`` turn the console off where it would raise."""

    @functools.wraps(method)
    def call(self: ConsoleSink, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self.mode == "off":
            return
        try:
            method(self, *args, **kwargs)
        except Exception:
            self._give_up()

    return call


class ConsoleSink:
    """Shows a run to a person; a failure turns it off and is logged, the run goes on.

    In live mode the run's threads only store what is to be shown and a daemon thread draws: a slow
    or stopped terminal cannot hold up the run, and the seconds go on while a step takes long. After
    a drawing it rests 150 times the CPU time that it took, at least 0.25 s and at most 2 s: below
    1 % of one core.

    Args:
        mode: ``auto`` is ``live`` on a terminal that shows UTF-8, ``plain`` elsewhere and wherever
            the environment variable ``CI`` is set.
        run_name: shown in the title.
        steps: learner steps to train, None if open.
        staleness_max: the configured bound, None if unknown.
        max_seconds: the run ends after this time, None if it does not.
        run_dir: folder of the run, for the last line of the table.
        plain_interval_s: at most one plain line in this time, besides evaluations and the last.
        console: where to write; standard output if None.
        clock: seconds that never go back.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        run_name: str,
        steps: int | None = None,
        staleness_max: int | None = None,
        max_seconds: float | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        plain_interval_s: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in ("auto", "live", "plain", "off"):
            raise ValueError(f"mode must be auto, live, plain or off, got {mode!r}")
        self._console = console or Console()
        self.mode: Mode = _choose(self._console) if mode == "auto" else mode
        footer = "" if run_dir is None else _tensorboard_command(run_dir)
        self._view = RunView(run_name, steps=steps, staleness_max=staleness_max, footer=footer)
        self._clock = clock
        self._start = clock()
        self._max_seconds = max_seconds
        self._plain_interval_s = plain_interval_s
        self._plain_due = self._start
        self._step_times: deque[tuple[int, float]] = deque(maxlen=_ETA_STEPS)
        self._activity: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self._painter: _Painter | None = None

    @_never_raises
    def status(self, text: str) -> None:
        """Say what goes on besides training, such as ``loading policy``; ``""`` for nothing.

        Before the first step the phases are listed with their seconds.
        """
        now = self._clock()
        with self._lock:
            if self._activity is not None and not self._view.metrics:
                self._view.phases.append((self._activity[0], now - self._activity[1]))
            self._activity = (text, now) if text else None
        if self.mode == "plain" and text:
            self._print(f"{duration(now - self._start)}  {text}")
        self._show()

    @_never_raises
    def announce(self, text: str) -> None:
        """Say what stays true during the run, such as an address; also in the live table."""
        with self._lock:
            self._view.footer = "   ".join(part for part in (text, self._view.footer) if part)
        if self.mode == "plain":
            self._print(text)
        self._show()

    @_never_raises
    def update(self, metrics: Scalars) -> None:
        """Show newer values while a step is under way."""
        with self._lock:
            self._view.show(metrics)
        self._show()

    @_never_raises
    def write(self, step: int, *, metrics: Scalars, histograms: Histograms) -> None:
        """Show the metrics of a finished step."""
        now = self._clock()
        with self._lock:
            self._end_startup()
            self._view.append(step, metrics=metrics, histograms=histograms)
            self._step_times.append((step, now))
        if self.mode == "plain":
            last = step == self._view.steps
            if now >= self._plain_due or last or metrics.get("eval/reward_mean") is not None:
                self._plain_due = now + self._plain_interval_s
                self._print(plain_line(self._timed_view()))
        self._show()

    @_never_raises
    def finish(self, summary: Mapping[str, Any], *, run_dir: str | os.PathLike[str]) -> None:
        """Leave the last table on the screen and say how the run ended and where to look.

        Args:
            summary: content of ``summary.json``; what it lacks is left out.
            run_dir: folder of the run.
        """
        with self._lock:
            self._activity = None
        self._stop_painter(redraw=True)
        self._print(_summary_line(summary))
        waste = summary.get("largest_waste")
        if waste:
            self._print(f"largest waste  {waste['text']}")
        self._print(f"run folder   {shlex.quote(str(run_dir))}")
        report = Path(run_dir) / "report.html"
        if report.is_file():
            self._print(f"report       {shlex.quote(str(report))}")
        if (Path(run_dir) / "tensorboard").is_dir():
            self._print(f"TensorBoard  {_tensorboard_command(run_dir)}")
        if (Path(run_dir) / "trace").is_dir():
            self._print(f"timeline     python -m skyrl_async.timeline {shlex.quote(str(run_dir))}")
        self.mode = "off"

    @_never_raises
    def close(self) -> None:
        """Stop drawing and give the cursor back; may be called twice."""
        self._stop_painter(redraw=True)
        self.mode = "off"

    def _end_startup(self) -> None:
        """Stop showing the last start-up phase once there is a first step."""
        if not self._step_times:
            self._activity = None

    def _show(self) -> None:
        if self.mode == "live" and self._painter is None:
            self._painter = _Painter(self._console, self._draw, self._give_up)
            atexit.register(self.close)
            self._painter.start()

    def _draw(self) -> RenderableType:
        return render(self._timed_view(), width=self._console.width)

    def _timed_view(self) -> RunView:
        """Return the view with its times up to date.

        The painter draws from it without the lock, so it gets containers of its own.
        """
        now = self._clock()
        with self._lock:
            view = self._view
            view.elapsed_s = now - self._start
            view.seconds_left = self._seconds_left(now)
            activity = self._activity
            view.activity = None if activity is None else (activity[0], now - activity[1])
            return view.copy()

    def _seconds_left(self, now: float) -> float | None:
        if self._view.steps is not None and self._view.step >= self._view.steps:
            return None
        limits = []
        if self._max_seconds is not None:
            limits.append(self._start + self._max_seconds - now)
        if self._view.steps is not None and len(self._step_times) > 1:
            (step, then), (last_step, last) = self._step_times[0], self._step_times[-1]
            ends = last + (last - then) / (last_step - step) * (self._view.steps - last_step)
            limits.append(ends - now)
        return max(0.0, min(limits)) if limits else None

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _stop_painter(self, *, redraw: bool) -> None:
        painter, self._painter = self._painter, None
        if painter is not None:
            atexit.unregister(self.close)
            painter.stop(redraw=redraw)

    def _give_up(self) -> None:
        """Turn the console off because of the exception that is being handled."""
        self.mode = "off"
        _logger.warning("the console failed and is off; the run goes on", exc_info=True)
        with contextlib.suppress(Exception):
            self._stop_painter(redraw=False)


class _Painter:
    """Draws into rich's ``Live`` from a thread of its own, see ``ConsoleSink``."""

    def __init__(
        self, console: Console, draw: Callable[[], RenderableType], on_error: Callable[[], None]
    ) -> None:
        self._draw = draw
        self._on_error = on_error
        self._stopping = threading.Event()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)

    def start(self) -> None:
        """Take over the terminal."""
        self._live.start()
        self._thread.start()

    def stop(self, *, redraw: bool) -> None:
        """Give the terminal back, after a last drawing if ``redraw``.

        A terminal that takes nothing for 2 s is left as it is.
        """
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)
            if self._thread.is_alive():
                return
        try:
            if redraw:
                self._live.update(self._draw(), refresh=True)
        finally:
            self._live.stop()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                started = time.thread_time()
                self._live.update(self._draw(), refresh=True)
                self._stopping.wait(timeout=pause_s(time.thread_time() - started))
        except Exception:
            self._on_error()


def pause_s(cost_s: float) -> float:
    """Return how long to rest after a drawing that took ``cost_s`` of CPU time."""
    return min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, _PAUSE_OVER_COST * cost_s))


def _choose(console: Console) -> Mode:
    """Return what ``auto`` means here."""
    automated = os.environ.get("CI", "").lower() not in ("", "0", "false")
    capable = console.is_terminal and not console.is_dumb_terminal
    return "live" if capable and not automated and not console.options.ascii_only else "plain"


def _tensorboard_command(run_dir: str | os.PathLike[str]) -> str:
    return f"tensorboard --logdir {shlex.quote(str(run_dir))}"


def _summary_line(summary: Mapping[str, Any]) -> str:
    """Return how the run ended, from the keys of ``summary.json``."""
    head = str(summary.get("status", "ended"))
    if "steps" in summary:
        head += f" after {summary['steps']} steps"
    if "seconds" in summary:
        head += f" in {duration(summary['seconds'])}"
    fields = [head]
    for key, label in (("reward_final", "reward"), ("eval_reward_final", "eval reward")):
        if summary.get(key) is not None:
            fields.append(f"{label} {number(summary[key])}")
    if summary.get("staleness_observed_max") is not None:
        bound = summary.get("staleness_configured_max")
        of = "" if bound is None else f" (bound {bound})"
        fields.append(f"staleness at most {number(summary['staleness_observed_max'])}{of}")
    dropped = [f"{n} {reason}" for reason, n in (summary.get("dropped") or {}).items() if n]
    if dropped:
        fields.append("dropped " + ", ".join(dropped))
    return ", ".join(fields)
