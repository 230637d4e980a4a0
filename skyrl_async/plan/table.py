"""Forecasts as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_async.plan.search import Split


def print_splits(splits: Sequence[Split], *, with_gpus: bool) -> None:
    """Print one line for each split, under a header.

    Args:
        splits: in the order of the lines.
        with_gpus: whether to show how many GPUs the learner has.
    """
    gpus = f"{'learner':>9}" if with_gpus else ""
    print(
        f"{'engines':>8}{gpus}{'K':>4}{'tokens/s':>12}{'trained/s':>12}{'traj/s':>10}"
        f"{'steps/s':>9}{'learner idle':>14}{'engine idle':>13}{'staleness':>11}{'dropped':>9}"
        f"{'masked':>8}"
    )
    for split in splits:
        f = split.forecast
        column = f"{split.learner_gpus:>9}" if with_gpus else ""
        note = "  in turn on all GPUs" if split.colocated else ""
        print(
            f"{split.num_engines:>8}{column}{split.max_staleness:>4}{f.tokens_per_s:>12,.0f}"
            f"{f.trained_tokens_per_s:>12,.0f}{f.trajectories_per_s:>10,.4g}{f.steps_per_s:>9.3g}"
            f"{f.learner_idle_fraction:>13.0%} {f.engine_idle_fraction:>12.0%} "
            f"{f.staleness_mean:>10.2f}{f.dropped_fraction:>9.1%}{f.masked_fraction:>8.1%}{note}"
        )
