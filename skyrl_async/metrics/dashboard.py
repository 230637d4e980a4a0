"""What a person sees of a run: the live table and the plain line, as functions of a ``RunView``.

Nothing here keeps time, starts threads or writes; ``console.py`` does.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from skyrl_async.metrics.formatting import (
    duration,
    number,
    percent,
    short_time,
    size,
    sparkline,
)
from skyrl_async.metrics.names import is_idle_part
from skyrl_async.metrics.view import RunView

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BOX = box.Box("╭──╮\n│  │\n├──┤\n│  │\n├──┤\n├──┤\n│  │\n╰──╯\n")
_LABEL_WIDTH = 14
_VALUE_WIDTH = 6
_NOTE_WIDTH = 31
_BORDERS_AND_GAPS = 13
_BUSY_COLORS = ("green", "blue", "cyan", "magenta", "bright_green", "bright_blue")
_LAG_COLORS = ("green", "yellow", "bright_red", "magenta", "blue", "cyan")
_ROLES = ("learner", "engine", "actor")


def render(view: RunView, *, width: int) -> RenderableType:
    """Return the live table, or the start-up phases while there are no metrics yet."""
    if not view.metrics:
        return Group(_title(view), *_phase_lines(view))
    parts: list[RenderableType] = [_title(view), _table(view, width=width)]
    footer = Text(style="dim", no_wrap=True, overflow="ellipsis")
    if view.activity is not None:
        footer.append(f" {view.activity[0]} {view.activity[1]:.0f} s  ", style="not dim yellow")
    footer.append(f" {view.footer}" if view.footer else "")
    return Group(*parts, footer) if footer else Group(*parts)


def plain_line(view: RunView) -> str:
    """Return the newest step as one short ASCII line."""
    get = view.metrics.get
    step = f"step {view.step}" + (f"/{view.steps}" if view.steps else "")
    fields = [step, f"reward {number(get('reward/mean'))}"]
    if view.eval_step is not None:
        fields.append(f"eval {number(get('eval/reward_mean'))}")
    bound = "" if view.staleness_max is None else f"/{view.staleness_max}"
    lag = f"{number(get('staleness/mean'))} max {number(get('staleness/max'))}{bound}"
    fields.append(f"staleness {lag}")
    fields.append(f"{number(get('throughput/generated_tokens_per_s'))} tok/s")
    idle = [
        f"{role} {100 * _idle(parts):.0f}%"
        for role, parts in _role_parts(view).items()
        if role != "actor"
    ]
    if idle:
        fields.append("idle " + " ".join(idle))
    if any(view.dropped.values()):
        fields.append(f"dropped {sum(view.dropped.values())}")
    left = "" if view.seconds_left is None else f", {duration(view.seconds_left)} left"
    return "  ".join([*fields, duration(view.elapsed_s) + left])


def _table(view: RunView, *, width: int) -> Table:
    """Return the table; the trend column takes what the others leave."""
    spare = width - _BORDERS_AND_GAPS - _LABEL_WIDTH - _VALUE_WIDTH - _NOTE_WIDTH
    trend_width = max(4, min(40, spare))
    note_width = max(8, min(48, _NOTE_WIDTH + spare - trend_width))
    table = Table(box=_BOX, show_header=False, border_style="dim", padding=(0, 1))
    table.add_column(width=_LABEL_WIDTH, no_wrap=True)
    table.add_column(width=_VALUE_WIDTH, no_wrap=True, justify="right", style="bold")
    table.add_column(width=trend_width, no_wrap=True)
    table.add_column(width=note_width, no_wrap=True, overflow="ellipsis", style="dim")
    for block in (_learning_rows, _lag_rows, _speed_rows, _state_rows):
        for label, value, trend, note in block(view, trend_width):
            table.add_row(label, value, trend, note)
        table.add_section()
    return table


_Row = tuple[str, RenderableType, RenderableType, RenderableType]


def _learning_rows(view: RunView, width: int) -> list[_Row]:
    get = view.metrics.get
    reward_note = (
        f"trained {number(get('reward/trained_mean'))}, spread {number(get('reward/std'))}"
    )
    eval_note = "not yet" if view.eval_step is None else f"greedy, at step {view.eval_step}"
    return [
        (
            "reward",
            number(get("reward/mean")),
            _trend(view, "reward/mean", width, "green"),
            reward_note,
        ),
        (
            "eval reward",
            number(get("eval/reward_mean")),
            _trend(view, "eval/reward_mean", width, "green"),
            eval_note,
        ),
        (
            "entropy",
            number(get("policy/entropy")),
            _trend(view, "policy/entropy", width, "blue"),
            f"gradient norm {number(get('policy/grad_norm'))}",
        ),
    ]


def _lag_rows(view: RunView, width: int) -> list[_Row]:
    get = view.metrics.get
    largest, bound = get("staleness/max"), view.staleness_max
    over = largest is not None and bound is not None and largest > bound
    note = Text(f"p95 {number(get('staleness/p95'))}, ")
    note.append(
        f"max {number(largest)}" + ("" if bound is None else f" of {bound}"),
        style="bold red" if over else "",
    )
    total = sum(view.lag_counts.values())
    shares = {str(lag): n / total for lag, n in sorted(view.lag_counts.items())} if total else {}
    colors = dict(zip(shares, _LAG_COLORS * (1 + len(shares) // len(_LAG_COLORS)), strict=False))
    weights = (
        f"weights {number(get('offpolicy/importance_weight_mean'))}, "
        f"max {number(get('offpolicy/importance_weight_max'))}"
    )
    return [
        (
            "staleness",
            number(get("staleness/mean")),
            _trend(view, "staleness/mean", width, "yellow"),
            note,
        ),
        (
            "tokens by age",
            percent(shares.get("0", 0.0)) if shares else "-",
            _bar(shares, colors, width),
            _legend(shares, colors, unit="%"),
        ),
        (
            "ESS of weights",
            percent(get("offpolicy/ess_fraction")),
            _trend(view, "offpolicy/ess_fraction", width, "magenta"),
            weights,
        ),
        (
            "clipped",
            percent(get("offpolicy/clip_fraction")),
            _trend(view, "offpolicy/clip_fraction", width, "magenta"),
            f"KL to behavior {number(get('offpolicy/kl_behavior'))}",
        ),
    ]


def _speed_rows(view: RunView, width: int) -> list[_Row]:
    get = view.metrics.get
    rows: list[_Row] = [
        (
            "tokens/s",
            number(get("throughput/generated_tokens_per_s")),
            _trend(view, "throughput/generated_tokens_per_s", width, "cyan"),
            f"trained {number(get('throughput/trained_tokens_per_s'))}/s",
        ),
        (
            "trajectories/s",
            number(get("throughput/trajectories_per_s")),
            _trend(view, "throughput/trajectories_per_s", width, "cyan"),
            "",
        ),
    ]
    for role, parts in _role_parts(view).items():
        busy = [part for part in parts if not is_idle_part(part)]
        colors = {part: _BUSY_COLORS[i % len(_BUSY_COLORS)] for i, part in enumerate(busy)}
        idle = _idle(parts)
        legend = _legend({part: parts[part] for part in busy}, colors)
        style = "green" if idle < 0.1 else "yellow" if idle < 0.4 else "red"
        if role == "actor":  # its slots wait for admission whenever nothing is wrong
            style = ""
        rows.append(
            (f"{role} idle", Text(percent(idle), style=style), _bar(parts, colors, width), legend)
        )
    return rows


def _state_rows(view: RunView, width: int) -> list[_Row]:
    get = view.metrics.get
    version, live = get("policy_version"), get("live_version")
    versions = "" if version is None else f"engines at {number(live)}"
    stall, transfer = get("sync/stall_s"), get("sync/transfer_s")
    dropped = sorted(view.dropped.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped if n)
    total = sum(view.dropped.values())
    return [
        (
            "version",
            number(version),
            Text(versions, style="dim"),
            f"stall {short_time(stall)}, transfer {short_time(transfer)}",
        ),
        (
            "buffer groups",
            number(get("buffer/groups")),
            _trend(view, "buffer/groups", width, "blue"),
            size(get("buffer/bytes")),
        ),
        ("dropped", Text(str(total), style="yellow" if total else ""), "", reasons),
    ]


def _title(view: RunView) -> Table:
    """Return the line with name, step, progress and time."""
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(no_wrap=True)
    line.add_column(ratio=1, min_width=8)
    line.add_column(no_wrap=True, justify="right")
    of = "" if view.steps is None else f" of {view.steps}"
    left = "" if view.seconds_left is None else f", {duration(view.seconds_left)} left"
    bar: RenderableType = ""
    if view.steps:
        bar = ProgressBar(total=view.steps, completed=min(view.step, view.steps))
    line.add_row(
        Text(f" {view.run_name}", style="bold"),
        f"step {view.step}{of}",
        bar,
        f"{duration(view.elapsed_s)}{left} ",
    )
    return line


def _phase_lines(view: RunView) -> list[Text]:
    """Return start-up phases: finished ones with a check mark, the running one with a spinner."""
    lines = [
        Text.assemble((" ✓ ", "green"), f"{text:<40}", (f"{seconds:>6.1f} s", "dim"))
        for text, seconds in view.phases
    ]
    if view.activity is not None:
        text, seconds = view.activity
        turn = _SPINNER[int(seconds * 4) % len(_SPINNER)]
        lines.append(
            Text.assemble((f" {turn} ", "yellow"), f"{text:<40}", (f"{seconds:>6.1f} s", "dim"))
        )
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines


def _trend(view: RunView, name: str, width: int, style: str) -> Text:
    trend = view.trends.get(name)
    if trend is None:
        return Text("")
    from_zero = not name.startswith(("reward", "eval"))
    return Text(sparkline(trend.means, width=width, from_zero=from_zero), style=style)


def _bar(shares: Mapping[str, float], colors: Mapping[str, str], width: int) -> Text:
    """Return shares that add up to 1 as one bar; a share without color is drawn as idle."""
    bar = Text(no_wrap=True)
    start = done = 0.0
    for part, share in sorted(shares.items(), key=lambda item: item[0] not in colors):
        done += share
        cells = round(done * width) - round(start * width)
        color = colors.get(part)
        bar.append(("█" if color else "░") * cells, style=color or "red")
        start = done
    return bar


def _legend(shares: Mapping[str, float], colors: Mapping[str, str], *, unit: str = "") -> Text:
    """Return the names of shares in the colors of their bar, with percents."""
    legend = Text(no_wrap=True, overflow="ellipsis")
    for part, share in shares.items():
        if share >= 0.005:
            legend.append(f"{part} ", style=f"not dim {colors[part]}")
            legend.append(f"{100 * share:.0f}{unit} ")
    return legend


def _role_parts(view: RunView) -> dict[str, dict[str, float]]:
    """Return role -> part -> share of the roles that reported, largest share first."""
    roles: dict[str, dict[str, float]] = {}
    for role in _ROLES:
        prefix = f"idle/{role}/"
        parts = {
            name.removeprefix(prefix).removesuffix("_fraction"): share
            for name, share in view.metrics.items()
            if name.startswith(prefix)
        }
        if parts:
            roles[role] = parts
    return roles


def _idle(parts: Mapping[str, float]) -> float:
    return sum(share for part, share in parts.items() if is_idle_part(part))
