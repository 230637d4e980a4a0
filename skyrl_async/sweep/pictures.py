"""Pictures of a sweep over methods and lags; needs matplotlib (``pip install 'skyrl_async[lab]'``).

Every picture is written twice, as PNG and as SVG. A line is the mean over seeds; its 95 %
interval is a band, or against the lag a bar (of three seeds or more). A cross marks a group of runs
of which most collapsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_async.sweep.rows import Row
from skyrl_async.sweep.statistics import Interval, Summary, interval, smoothed

_SIZE_INCHES = (8.5, 4.5)
_DPI = 110
_DODGE = 0.6
_MIN_RUNS = 2
_POINTS = 120
"""Of a curve against seconds, on which the runs are compared."""


def draw_all(
    rows: Sequence[Row], summaries: Sequence[Summary], folder: Path, *, lags: Sequence[int]
) -> list[Path]:
    """Draw every picture and return the files.

    Args:
        rows: of the sweep; unfinished ones are left out.
        summaries: of the same rows.
        folder: to write to.
        lags: for which the rewards are drawn against steps and against seconds.

    Raises:
        ImportError: without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = [row for row in rows if row.status == "finished"]
    figures: dict[str, Any] = {}
    for lag in lags:
        chosen = [row for row in done if int(row.cell["lag"]) == lag]
        if chosen:
            figures[f"reward_by_step_lag_{lag}"] = by_step(chosen, title=f"lag {lag}")
            figures[f"reward_by_second_lag_{lag}"] = by_second(chosen, title=f"lag {lag}")
    figures["reward_by_lag"] = by_lag(summaries, lambda s: s.reward, label="reward at the end")
    figures["ess_by_lag"] = by_lag(
        summaries, lambda s: s.ess_fraction, label="effective sample fraction"
    )
    figures["kl_by_lag"] = by_lag(
        summaries, lambda s: s.kl_behavior, label="KL of behavior and policy, nats per token"
    )
    return [path for name, figure in figures.items() for path in _save(figure, folder / name)]


def by_step(rows: Sequence[Row], *, title: str) -> Any:
    """Draw the reward of the sampled episodes against learner steps, one line per method."""
    figure, axes = _axes("learner step", "reward, mean of 10 steps", title)
    for index, (method, runs) in enumerate(_methods(rows).items()):
        curves = [smoothed(run.series.get("reward/mean", ())) for run in runs]
        length = min(len(curve) for curve in curves)
        _band(axes, range(1, length + 1), [c[:length] for c in curves], method, index)
    return _with_legend(figure, axes)


def by_second(rows: Sequence[Row], *, title: str) -> Any:
    """Draw the same against seconds of training, up to the end of each method's shortest run."""
    import numpy as np

    figure, axes = _axes("seconds of training", "reward, mean of 10 steps", title)
    for index, (method, runs) in enumerate(_methods(rows).items()):
        times = [np.asarray(run.series["time_s"], float) for run in runs]
        grid = np.linspace(max(t[0] for t in times), min(t[-1] for t in times), _POINTS)
        curves = [
            np.interp(grid, t, smoothed(run.series["reward/mean"])).tolist()
            for t, run in zip(times, runs, strict=True)
        ]
        _band(axes, grid.tolist(), curves, method, index)
    return _with_legend(figure, axes)


def by_lag(
    summaries: Iterable[Summary], value: Callable[[Summary], Interval | None], *, label: str
) -> Any:
    """Draw a figure of every method against the lag; runs of different length are other lines."""
    figure, axes = _axes("lag, policy versions", label, "")
    lines: dict[tuple[str, int], list[Summary]] = {}
    for summary in summaries:
        lines.setdefault((summary.method, summary.steps), []).append(summary)
    methods = sorted({method for method, _ in lines})
    every = sorted({point.lag for points in lines.values() for point in points})
    shortest = min((steps for _, steps in lines), default=0)
    for (method, steps), points in sorted(lines.items()):
        known = [(p, v) for p in points if (v := value(p)) is not None]
        if not known:
            continue
        style = {**_style(methods.index(method)), "linestyle": "-" if steps == shortest else "--"}
        # Side by side, so that the bars of one lag can be told apart.
        beside = _DODGE * (methods.index(method) - (len(methods) - 1) / 2) / len(methods)
        places = [every.index(point.lag) + beside for point, _ in known]
        name = method if steps == shortest else f"{method}, {steps} steps"
        axes.plot(places, [v.mean for _, v in known], label=name, **style)
        # The interval of two runs is so wide that it would hide the others.
        whole = [(x, v) for x, (_, v) in zip(places, known, strict=True) if v.count > _MIN_RUNS]
        for x, v in whole:
            axes.vlines(x, v.low, v.high, color=style["color"], alpha=0.35, linewidth=1.2)
        marked = [
            (x, v.mean)
            for x, (p, v) in zip(places, known, strict=True)
            if 2 * p.collapsed > v.count
        ]
        axes.plot(*zip(*marked, strict=True), "kx", markersize=9) if marked else None
    axes.set_xticks(range(len(every)), [str(lag) for lag in every])
    return _with_legend(figure, axes)


def _methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the longest of what each method has, so that curves of one length are averaged."""
    steps = min(int(row.config["run"]["steps"]) for row in rows)
    same = [row for row in rows if int(row.config["run"]["steps"]) == steps]
    return {
        name: [row for row in same if str(row.cell["method"]) == name]
        for name in sorted({str(row.cell["method"]) for row in same})
    }


def _band(
    axes: Any,
    positions: Sequence[float],
    curves: Sequence[Sequence[float]],
    label: str,
    index: int,
) -> None:
    points = [interval(values) for values in zip(*curves, strict=True)]
    style = _style(index)
    axes.plot(positions, [p.mean for p in points], label=label, **{**style, "marker": ""})
    lows, highs = [p.low for p in points], [p.high for p in points]
    axes.fill_between(positions, lows, highs, color=style["color"], alpha=0.1, linewidth=0)


def _style(index: int) -> dict[str, Any]:
    return {"color": f"C{index % 10}", "marker": "osD^vP*X<>"[index % 10], "markersize": 4}


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _with_legend(figure: Any, axes: Any) -> Any:
    # Wide bands of few seeds would leave the lines little room.
    tops = [max(line.get_ydata(), default=0.0) for line in axes.get_lines()]
    axes.set_ylim(0, 1.1 * max(tops, default=0.0) or 1.0)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _save(figure: Any, path: Path) -> list[Path]:
    files = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    # Without a date and random ids a picture of the same figures is the same file.
    metadata: Mapping[str, Mapping[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        for file in files:
            figure.savefig(file, dpi=_DPI, metadata=metadata[file.suffix])
    return files
