"""The page of results: every claim beside the figure that a file of ``results/`` holds for it.

``python benchmarks/results_page.py`` writes ``docs/results.md``. Figures are read from the files
that the benchmarks wrote, never typed in; so are the command that repeats a claim, the commit, the
date and the targets that were missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of the page.

    Attributes:
        text: what is claimed.
        source: name of the result's file, without its ending.
        figure: reads the measured figure from that file.
    """

    text: str
    source: str
    figure: Callable[[Result], str]


def _seeds(result: Result, name: str) -> list[Any]:
    return [row[name] for key, row in result["rows"].items() if key.startswith("seed")]


def _reached(row: Mapping[str, Any]) -> str:
    return f"{row['reward']:.2f} after {row['steps']} steps"


def _hard_form(row: Mapping[str, Any]) -> str:
    reward, seconds = row["eval_reward_final"], row["seconds_to_reward"]
    if seconds is None:
        return f"{reward:.2f} in the end, 0.95 not reached"
    return f"{reward:.2f} after {seconds:.0f} s"


def _joined(values: list[Any], digits: int = 0) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _largest(errors: Mapping[str, float]) -> float:
    return max(abs(error) for error in errors.values())


def _best(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    return max(verdicts, key=lambda method: verdicts[method]["stale"])


def _worst_deviation(result: Result, kind: str) -> float:
    rows = [row for row in result["swaps"] if row["kv_after_swap"] == kind]
    return max(row["logprob_deviation_max"] for row in rows)


CLAIMS = (
    Claim(
        text="Default run: seconds of training to a greedy held-out reward of 0.95, three seeds",
        source="default_run",
        figure=lambda r: f"{_joined(_seeds(r, 'seconds_to_reward'))} s",
    ),
    Claim(
        text="From process start to the first learner step: with Ray; with `runtime=local`",
        source="default_run",
        figure=lambda r: (
            f"{_joined(_seeds(r, 'seconds_to_first_step'), 1)} s; "
            f"{r['rows']['local']['seconds_to_first_step']:.1f} s"
        ),
    ),
    Claim(
        text="Hard form of the default game (1 to 15, four guesses)",
        source="default_run",
        figure=lambda r: _hard_form(r["rows"]["hard form"]),
    ),
    Claim(
        text="Asynchronous over synchronous training, tools of 50 ms: trained trajectories/s",
        source="async_vs_sync",
        figure=lambda r: f"{r['speedup']:.1f} x (ideal {r['ideal_speedup']:.1f} x)",
    ),
    Claim(
        text="The same: seconds to a held-out reward of 0.95; reward of both in the end",
        source="async_vs_sync",
        figure=lambda r: (
            f"{r['seconds_to_reward_async']:.0f} s against {r['seconds_to_reward_sync']:.0f} s; "
            f"{r['reward_async']:.2f} and {r['reward_sync']:.2f}"
        ),
    ),
    Claim(
        text="One turn, largest of three digits, beside TRL in one run: trajectories/s",
        source="single_turn",
        figure=lambda r: (
            f"{r['trajectories_per_s']:.0f} against {r['trl']['trajectories_per_s']:.0f}"
        ),
    ),
    Claim(
        text="Embedded engine, 64 concurrent, one core, over transformers' continuous batching",
        source="engine_throughput",
        figure=lambda r: f"{r['tokens_per_s'] / 1000:.1f} k tokens/s, {r['speedup']:.1f} x",
    ),
    Claim(
        text="Logprobs against a plain forward pass across weight swaps: KV recomputed; kept",
        source="engine_throughput",
        figure=lambda r: (
            f"{_worst_deviation(r, 'recompute'):.1e}; "
            f"at most {_worst_deviation(r, 'keep'):.1f} nats"
        ),
    ),
    Claim(
        text="Engine throughput while 50 MB are published all the time, KV kept; longest gap",
        source="publish_stall",
        figure=lambda r: (
            f"{r['throughput_ratio']:.3f} of the control; "
            f"{r['longest_gap_decode_steps']:.2f} decode steps"
        ),
    ),
    Claim(
        text="SGLang: stall of an update of 500 MB at full rate, staged against sent to the paused",
        source="sglang_update",
        figure=lambda r: (
            f"{1000 * r['stall_s']['500']['full']['memory']:.0f} ms against "
            f"{1000 * r['stall_s']['500']['full']['direct']:.0f} ms"
        ),
    ),
    Claim(
        text="SGLang: tokens/s through our pool over a bare loop; 1, 8 and 32 concurrent",
        source="sglang_client",
        figure=lambda r: _joined([row["ratio_to_bare"]["pool"] for row in r["rows"]], 2),
    ),
    Claim(
        text="SGLang: bytes of a published adapter of rank 16 over merged weights; stall, KV kept",
        source="sglang_adapters",
        figure=lambda r: (
            f"{r['bytes_ratio']['200']:.3f}; "
            f"{1000 * r['stall_s']['200']['folder keep']:.0f} ms against "
            f"{1000 * r['stall_s']['200']['merged keep']:.0f} ms"
        ),
    ),
    Claim(
        text="Learner, heavy-tailed lengths: packed over padded tokens/s; memory",
        source="learner_throughput",
        figure=lambda r: f"{r['packed_speedup']:.1f} x; {r['packed_memory_ratio']:.2f} x",
    ),
    Claim(
        text="Memory of logprobs with gradients, 8,192 tokens of 151,936 words, over one matrix of "
        "all logits",
        source="learner_throughput",
        figure=lambda r: f"{r['logprob_memory_ratio']:.2f}",
    ),
    Claim(
        text="Losses and corrections over the plain PPO loss: most time; most memory",
        source="algorithms",
        figure=lambda r: (
            f"{max(row['relative_time'] for row in r['rows']):.2f} x; "
            f"{max(row['relative_memory'] for row in r['rows']):.2f} x"
        ),
    ),
    Claim(
        text="All weights; adapters merged; adapters alone, of rank 4, from the same start",
        source="lora",
        figure=lambda r: "; ".join(_reached(row) for row in r["rows"]),
    ),
    Claim(
        text="Killed at random moments and resumed: kills, most steps lost of ten allowed",
        source="resume",
        figure=lambda r: "; ".join(
            f"{name}: {len(run['kills'])}, {run['most_steps_lost']}"
            for name, run in r["runs"].items()
        ),
    ),
    Claim(
        text="Simulated engines and learner, two actors, Ray: asynchronous over synchronous; one "
        "step off over synchronous",
        source="throughput",
        figure=lambda r: (
            f"{r['speedup']['2 actors, ray']['asynchronous']:.1f} x; "
            f"{r['speedup']['2 actors, ray']['one step off']:.1f} x"
        ),
    ),
    Claim(
        text="Staleness lab, reward at lag 8 over lag 0: without a correction; with a truncated "
        "importance weight; by the best method",
        source="staleness/staleness",
        figure=lambda r: "; ".join(
            f"`{method}` {r['verdicts'][method]['stale']:.2f} over "
            f"{r['verdicts'][method]['on_policy']:.2f}"
            for method in ("ppo_recomputed", "decoupled", _best(r["verdicts"]))
        ),
    ),
    Claim(
        text="Planner against six runs, three repeats each: largest error of trajectories/s; of "
        "mean staleness",
        source="planner",
        figure=lambda r: (
            f"{100 * _largest(r['throughput_error']):.1f} %; {_largest(r['staleness_error']):.2f}"
        ),
    ),
    Claim(
        text="CPU time of our own code for one trajectory: 10, 100 and 1,000 concurrent",
        source="throughput",
        figure=lambda r: f"{_joined(r['machinery_us_per_trajectory'])} µs",
    ),
    Claim(
        text="Timeline: cost of an event; of all events of the default run",
        source="timeline_overhead",
        figure=lambda r: f"{r['us_per_event']:.2f} µs; {100 * r['core_fraction']:.2f} % of a core",
    ),
    Claim(
        text="Report of a 10,000-step run: drawn in Chromium; size; network requests. Live page",
        source="report_page",
        figure=lambda r: (
            f"{r['report_drawn_s']:.2f} s; {r['report_kb']:.0f} kB; {r['requests']}. "
            f"{r['live_drawn_s']:.2f} s"
        ),
    ),
    Claim(
        text="Replay buffer through Ray, 1,024-token trajectories/s, groups of 16 as they finish: "
        "ours; TorchRL; TransferQueue",
        source="replay_buffer",
        figure=lambda r: "; ".join(
            f"{r['between_processes'][name]['trajectories_per_s']:.0f}"
            for name in ("ours", "torchrl", "transferqueue")
        ),
    ),
    Claim(
        text="The same, if the others' producers hold back until they have 64: ours over TorchRL; "
        "over TransferQueue",
        source="replay_buffer",
        figure=lambda r: (
            f"{r['torchrl_chunk64_ratio']:.1f} x; {r['transferqueue_chunk64_ratio']:.1f} x"
        ),
    ),
    Claim(
        text="Beside other trainers on one task (TRL's asynchronous one needs a GPU), "
        "trajectories/s",
        source="peers",
        figure=lambda r: "; ".join(
            f"{name} {row['trajectories_per_s']:.0f}"
            for name, row in r["rows"].items()
            if row.get("trajectories_per_s")
        ),
    ),
    Claim(
        text="Collapsing runs: greedy reward without the collapse guard; with it",
        source="collapse_guard",
        figure=lambda r: (
            f"{_joined([row['without']['reward'] for row in r['rows']], 2)}; "
            f"{_joined([row['with']['reward'] for row in r['rows']], 2)}"
        ),
    ),
)


def page(results: Path = RESULTS) -> str:
    """Return the page in Markdown.

    Raises:
        FileNotFoundError: if the result of a claim is not there.
    """
    rows = ["| claim | measured | command | commit | date |", "|---|---|---|---|---|"]
    misses, hardware = [], []
    for claim in CLAIMS:
        result = json.loads((results / f"{claim.source}.json").read_text())
        link = f"[{result['commit']}](../benchmarks/results/{claim.source}.json)"
        rows.append(
            f"| {claim.text} | {claim.figure(result)} | `{result['command']}` | {link} | "
            f"{result['date']} |"
        )
        hardware.append(result["hardware"])
        misses += [f"* `{result['command']}`: {miss}" for miss in result["misses"]]
    return "\n".join(
        (
            "# Results",
            "",
            "Written by `python benchmarks/results_page.py` from the files in "
            "[benchmarks/results](../benchmarks/results), which the commands wrote. Measured on "
            f"{'; '.join(dict.fromkeys(hardware))}, without a GPU. The machine was shared, so "
            "figures that are compared come from one run. The commit is the one that was checked "
            "out; `dirty` means that some files were newer.",
            "",
            *rows,
            "",
            "Targets that were missed:",
            "",
            *(dict.fromkeys(misses) or ["none."]),
            "",
        )
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(CLAIMS)} claims", file=sys.stderr)


if __name__ == "__main__":
    main()
