"""Does the staleness bound hold under heavy-tailed episodes, and what does each rule cost?

Every row is a run of ``bounded_run.py``: the real admission, replay buffer and ledger on a virtual
clock, whose unit is one learner step.

    python benchmarks/staleness_bound.py --quick
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bounded_run import RULES, Outcome, play
from report import finish, parse_args

from skyrl_async.plan.simulation import Stuck


def main() -> None:
    args = parse_args("The staleness bound and its rules under heavy-tailed episodes.")
    bounds = (0, 1, 2, 4, 8)
    steps = 800 if args.quick else 1600
    sizes = (1,) if args.quick else (1, 8)

    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    misses: list[str] = []
    print(
        "length: lost trajectories over kept ones; time: per learner step and per trained token, "
        "over that of mask\n"
        f"{'members':>7} {'K':>2} {'rule':<18}{'tokens':>9}{'over K':>8}{'groups over':>12}"
        f"{'max':>5}{'mean':>6}{'dropped':>9}{'lost':>8}{'masked':>8}{'length':>8}{'time/step':>10}{'/token':>7}"
    )
    for size, bound in itertools.product(sizes, bounds):
        mask: Outcome | None = None
        for rule in RULES:
            row: dict[str, Any] = {"group_size": size, "max_staleness": bound, "rule": rule}
            try:
                outcome = play(rule, max_staleness=bound, steps=steps // size, group_size=size)
            except Stuck as error:
                rows.append({**row, "deadlock": str(error)})
                print(f"{size:>7} {bound:>2} {rule:<18} deadlock {error}")
                if rule in ("mask", "drop", "pace"):
                    misses.append(f"{rule} K={bound} group_size={size}: deadlock")
                continue
            mask = mask or outcome
            row |= {**asdict(outcome), **slowdowns(outcome, mask)}
            rows.append(row)
            print_row(row)
            misses += missed(row)
    finish("staleness_bound", {"rows": rows}, misses, started, args.output)


def slowdowns(outcome: Outcome, mask: Outcome) -> dict[str, float]:
    """Return the time per learner step and per trained token, over those of ``mask``."""
    return {
        "step_slowdown": outcome.steps_time * mask.steps / (outcome.steps * mask.steps_time),
        "token_slowdown": (outcome.steps_time * mask.trained_tokens)
        / (outcome.trained_tokens * mask.steps_time),
    }


def missed(row: Mapping[str, Any]) -> list[str]:
    """Return the targets that a row misses: no rule may pass the bound, pace may drop nothing."""
    name = f"{row['rule']} K={row['max_staleness']} group_size={row['group_size']}"
    out = []
    if row["rule"] in ("mask", "drop", "pace") and row["tokens_over_bound"]:
        out.append(f"{name}: {row['tokens_over_bound']} tokens over the bound")
    if row["rule"] == "pace" and row["dropped_fraction"]:
        out.append(f"{name}: {row['dropped_fraction']:.2%} of the groups dropped")
    return out


def print_row(row: Mapping[str, Any]) -> None:
    ratio = row["lost_over_kept_length"]
    print(
        f"{row['group_size']:>7} {row['max_staleness']:>2} {row['rule']:<18}"
        f"{row['trained_tokens']:>9}{row['tokens_over_bound']:>8}"
        f"{row['groups_over_bound_fraction']:>12.2%}{row['staleness_max']:>5}"
        f"{row['staleness_mean']:>6.2f}{row['dropped_fraction']:>9.2%}"
        f"{row['lost_generation_fraction']:>8.1%}{row['masked_fraction']:>8.1%}"
        f"{'-' if ratio is None else f'{ratio:.2f}':>8}{row['step_slowdown']:>10.2f}"
        f"{row['token_slowdown']:>7.2f}"
    )


if __name__ == "__main__":
    main()
