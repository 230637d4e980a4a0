"""What a learner step reports: sums over loss tokens, so that any split gives the same numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from skyrl_async.algorithms.corrections import finite_mask
from skyrl_async.learner.objective import Objective
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.types import SampledBatch

_NAMES = (
    "tokens",
    "masked",
    "loss",
    "entropy",
    "importance_weight",
    "importance_weight_squared",
    "importance_weight_capped",
    "valid_tokens",
    "kl_behavior",
    "clipped",
    "kl_reference",
    "mismatch_tokens",
    "mismatch_kl",
)


class StepSums:
    """Accumulates one rank's sums over all optimizer steps of one learner step.

    Args:
        train_version: policy version at the start of the step.
        device: of the tensors that are added.

    Attributes:
        grad_norms: of each optimizer step, before clipping.
        value_losses: of the critic, likewise.
        teacher_divergences: mean log ratio of policy to teacher of each trained minibatch.
        skipped_minibatches: left out because something was not finite.
    """

    def __init__(self, *, train_version: int, device: torch.device | None = None) -> None:
        self.grad_norms: list[float] = []
        self.value_losses: list[float] = []
        self.teacher_divergences: list[float] = []
        self.skipped_minibatches = 0
        self._train_version = train_version
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        self._max_weight = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, microbatch: Microbatch, result: Objective, *, at_start: Tensor | None) -> None:
        """Add the tokens of one microbatch.

        Args:
            microbatch: that was trained.
            result: of it.
            at_start: ``[L]``, logprobs of the weights at the start of the step, exact ones; None
                if they are not known, and then the mismatch is not of these tokens.
        """
        reported = finite_mask(microbatch.behavior_logprobs)
        fresh = (microbatch.prefix_versions == self._train_version) & reported
        if at_start is None:
            fresh, at_start = torch.zeros_like(fresh), microbatch.behavior_logprobs
        log_ratio = (at_start - microbatch.behavior_logprobs)[fresh]
        values = {
            **result.sums,
            "mismatch_tokens": fresh.sum(),
            "mismatch_kl": (log_ratio.exp() - 1 - log_ratio).sum(),
        }
        self._sums += torch.stack([values[name].detach().double() for name in _NAMES])
        self._max_weight = torch.maximum(self._max_weight, result.largest_weight.double())

    def merge(self, minibatch: StepSums, *, grad_norm: float) -> None:
        """Add the sums of a minibatch that was trained."""
        self._sums += minibatch._sums
        self._max_weight = torch.maximum(self._max_weight, minibatch._max_weight)
        self.grad_norms.append(grad_norm)

    def metrics(self, ranks: RankGroup) -> dict[str, float]:
        """Return the step's metrics over all ranks, under the run's names.

        ``offpolicy/mismatch_kl`` is absent if no token's whole prefix has the learner's version,
        among those of which the exact logprobs at the start of the step are known.
        """
        totals = ranks.sum_(self._sums.clone()).tolist()
        largest = float(ranks.max_(self._max_weight.clone()))
        s = dict(zip(_NAMES, totals, strict=True))
        tokens = max(s["tokens"], 1.0)
        weight, squared = s["importance_weight"], s["importance_weight_squared"]
        out = {
            "learner/loss_tokens": s["tokens"],
            "loss/policy": s["loss"] / max(len(self.grad_norms), 1),
            "policy/entropy": s["entropy"] / tokens,
            "policy/grad_norm": math.fsum(self.grad_norms) / max(len(self.grad_norms), 1),
            "offpolicy/ess_fraction": weight**2 / (tokens * squared) if squared else 1.0,
            "offpolicy/importance_weight_mean": weight / tokens,
            "offpolicy/importance_weight_max": largest,
            "offpolicy/importance_weight_capped_fraction": s["importance_weight_capped"] / tokens,
            "offpolicy/kl_behavior": s["kl_behavior"] / max(s["valid_tokens"], 1.0),
            "offpolicy/clip_fraction": s["clipped"] / tokens,
            "offpolicy/masked_fraction": s["masked"] / max(s["masked"] + s["tokens"], 1.0),
            "loss/kl": s["kl_reference"] / tokens,
            "learner/skipped_minibatches": float(self.skipped_minibatches),
        }
        if self.value_losses:
            out["loss/value"] = math.fsum(self.value_losses) / len(self.value_losses)
        if self.teacher_divergences:
            divergences = self.teacher_divergences
            out["distillation/reverse_kl"] = math.fsum(divergences) / len(divergences)
        if s["mismatch_tokens"]:
            out["offpolicy/mismatch_kl"] = s["mismatch_kl"] / s["mismatch_tokens"]
        return out


def count_staleness(
    microbatches: Sequence[Microbatch], batch: SampledBatch, *, ranks: RankGroup
) -> dict[int, int]:
    """Count the trained tokens of all ranks by staleness.

    Args:
        microbatches: of this rank.
        batch: that they were made of.
        ranks: of the learner group; all of them call this.

    Raises:
        RuntimeError: if a token is beyond the bound: the buffer's guarantee is checked where it
            matters.
    """
    oldest = min(g.min_trainable_version for g in batch.groups)
    bound = batch.train_version - oldest
    counts: Counter[int] = Counter()
    for microbatch in microbatches if ranks.counts else ():
        lag = batch.train_version - microbatch.policy_versions
        values, numbers = lag.unique(return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    if counts and (max(counts) > bound or min(counts) < 0):
        raise RuntimeError(
            f"trained tokens with staleness {min(counts)}..{max(counts)}, bound 0..{bound} "
            f"at policy version {batch.train_version}"
        )
    if ranks.num_ranks > 1:
        table = torch.zeros(bound + 1, dtype=torch.int64)
        for staleness, number in counts.items():
            table[staleness] = number
        ranks.sum_(table)
        return {lag: int(n) for lag, n in enumerate(table.tolist()) if n}
    return dict(counts)
