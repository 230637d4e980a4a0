"""The metrics of a run: name, unit, meaning, and where they are drawn.

One table, shared by the TensorBoard layout, the console and the documentation. ``<...>`` in a name
stands for one lower-case word. Other names may be recorded too; these are kept stable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table.

    Attributes:
        name: slash-separated, ``<...>`` for one free word.
        unit: ``""`` for plain numbers.
        meaning: one line.
        section: group of the TensorBoard layout and of the documentation.
        chart: title of the chart that shows it with others; ``""`` for none.
    """

    name: str
    unit: str
    meaning: str
    section: str
    chart: str = ""

    @property
    def pattern(self) -> str:
        """Regular expression that matches the whole name."""
        return re.sub(r"<\w+>", "[a-z0-9_]+", self.name) + "$"


METRICS: tuple[Metric, ...] = (
    Metric("step", "", "learner step", "run"),
    Metric("time_s", "s", "since the recorder was made", "run"),
    Metric("optimizer_steps", "", "optimizer steps so far", "run"),
    Metric("nonfinite_values", "", "values of this object that were NaN or infinite", "run"),
    Metric("reward/mean", "", "mean of all trajectories finished in the step", "train", "reward"),
    Metric("reward/trained_mean", "", "mean of the trained groups", "train", "reward"),
    Metric("eval/reward_mean", "", "mean on held-out tasks, greedy", "train", "reward"),
    Metric("reward/std", "", "standard deviation of the same", "train", "reward spread"),
    Metric("rollout/generated_tokens_mean", "tokens", "sampled in a trajectory", "train", "length"),
    Metric("rollout/turns_mean", "", "replies in a trajectory", "train", "turns"),
    Metric("loss/policy", "", "policy loss", "train", "policy loss"),
    Metric("loss/value", "", "value loss", "train", "value loss"),
    Metric("learner/skipped_minibatches", "", "left out: loss or gradient not finite", "train"),
    Metric(
        "distillation/reverse_kl",
        "nats",
        "policy to teacher, at the start of the step",
        "train",
        "divergence from the teacher",
    ),
    Metric("loss/kl", "", "penalty for leaving the reference", "train", "KL penalty"),
    Metric("sft/loss", "nats", "of demonstrations, per token", "fine-tuning", "loss"),
    Metric("sft/eval_loss", "nats", "of those held out", "fine-tuning", "loss"),
    Metric("sft/epoch", "", "passes over the demonstrations so far", "fine-tuning"),
    Metric("sft/skipped_steps", "", "not finite, since the start", "fine-tuning"),
    Metric("policy/entropy", "nats", "mean entropy of a token", "train", "entropy"),
    Metric("policy/grad_norm", "", "gradient norm before clipping", "train", "gradient norm"),
    Metric("policy/lr", "", "learning rate", "train", "learning rate"),
    Metric(
        "offpolicy/ess_fraction",
        "fraction",
        "effective sample size of the importance weights over their number",
        "off-policy",
        "effective sample size",
    ),
    Metric(
        "offpolicy/importance_weight_mean",
        "",
        "mean of exp(proximal - behavior)",
        "off-policy",
        "importance weight",
    ),
    Metric("offpolicy/importance_weight_max", "", "largest", "off-policy", "importance weight"),
    Metric("offpolicy/kl_behavior", "nats", "KL of behavior to proximal", "off-policy", "KL"),
    Metric(
        "offpolicy/mismatch_kl",
        "nats",
        "engine against learner on tokens of equal version: numerics, not lag",
        "off-policy",
        "KL",
    ),
    Metric(
        "offpolicy/clip_fraction",
        "fraction",
        "tokens whose policy ratio was clipped",
        "off-policy",
        "clipped and masked",
    ),
    Metric(
        "offpolicy/masked_fraction",
        "fraction",
        "tokens that the correction took out of the loss",
        "off-policy",
        "clipped and masked",
    ),
    Metric("staleness/mean", "versions", "of the trained tokens", "staleness", "staleness"),
    Metric("staleness/p95", "versions", "95th percentile", "staleness", "staleness"),
    Metric("staleness/max", "versions", "largest", "staleness", "staleness"),
    Metric("staleness/histogram", "tokens", "trained tokens by staleness", "staleness"),
    Metric(
        "staleness/lost_generation_fraction",
        "fraction",
        "generated tokens that the bound kept out of the loss",
        "staleness",
        "cost of the bound",
    ),
    Metric(
        "staleness/masked_fraction",
        "fraction",
        "tokens of sampled groups that were too old",
        "staleness",
        "cost of the bound",
    ),
    Metric(
        "staleness/lost_over_kept_length",
        "",
        "mean length of lost over kept trajectories",
        "staleness",
        "length bias of the bound",
    ),
    Metric(
        "throughput/generated_tokens_per_s", "1/s", "sampled", "throughput", "tokens per second"
    ),
    Metric(
        "throughput/trained_tokens_per_s", "1/s", "in a loss", "throughput", "tokens per second"
    ),
    Metric(
        "throughput/trajectories_per_s", "1/s", "finished", "throughput", "trajectories per second"
    ),
    Metric(
        "idle/learner/<part>_fraction", "fraction", "wall time of the learner", "idle", "learner"
    ),
    Metric("idle/engine/<part>_fraction", "fraction", "wall time of the engines", "idle", "engine"),
    Metric("idle/actor/<part>_fraction", "fraction", "wall time of actors' slots", "idle", "actor"),
    Metric("policy_version", "", "finished learner steps", "sync", "versions"),
    Metric("live_version", "", "newest version that every engine runs", "sync", "versions"),
    Metric("sync/stall_s", "s", "an engine stood still for a swap", "sync", "seconds"),
    Metric("sync/transfer_s", "s", "a version was on its way", "sync", "seconds"),
    Metric("sync/bytes", "bytes", "sent to the engines", "sync", "bytes"),
    Metric(
        "sync/reprefilled_tokens", "", "KV recomputed after swaps", "sync", "re-prefilled tokens"
    ),
    Metric(
        "sync/versions_skipped", "", "replaced before they were sent", "sync", "skipped versions"
    ),
    Metric("buffer/groups", "", "groups in the replay buffer", "buffer", "groups"),
    Metric("buffer/bytes", "bytes", "their size", "buffer", "bytes"),
    Metric("checkpoint/save_s", "s", "from the copy until a checkpoint was whole", "sync"),
    Metric("guard/<action>", "", "actions of the collapse guard", "off-policy"),
    Metric("dropped/<reason>", "", "left untrained during the step", "buffer", "dropped"),
)


def find(name: str) -> Metric | None:
    """Return the row that describes ``name``, or None for a name outside the table."""
    return next((metric for metric in METRICS if re.match(metric.pattern, name)), None)


def is_idle_part(part: str) -> bool:
    """Tell whether a part of a time ledger is time without work: ``idle...`` or ``wait...``."""
    return part.startswith(("idle", "wait"))


def charts() -> dict[str, dict[str, list[str]]]:
    """Return section -> chart title -> name patterns, in the order of the table."""
    layout: dict[str, dict[str, list[str]]] = {}
    for metric in METRICS:
        if metric.chart:
            section = layout.setdefault(metric.section, {})
            section.setdefault(metric.chart, []).append(metric.pattern)
    return layout


def markdown_table() -> str:
    """Return the table in Markdown."""
    rows = ["| metric | unit | meaning |", "|---|---|---|"]
    rows += [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(rows)
