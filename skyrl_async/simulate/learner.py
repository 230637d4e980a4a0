"""A simulated learner: it takes as long as a step would, and changes nothing but the version."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from skyrl_async.learner.training_state import TrainingState
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.types import SampledBatch, StepResult

_BYTES_PER_FLOAT = 4


class Ledger(Protocol):
    """Where the learner says what it spends its time on."""

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Charge the time inside the context to ``name``."""
        ...


class Weights(torch.nn.Module):
    """Stands for a policy that nobody computes with: one parameter of a given size.

    Args:
        size_bytes: of the parameter, rounded down to whole floats.
    """

    def __init__(self, *, size_bytes: int) -> None:
        super().__init__()
        values = torch.zeros(max(1, size_bytes // _BYTES_PER_FLOAT))
        self.weights = torch.nn.Parameter(values)


class SimulatedLearner:
    """Has the methods of :class:`skyrl_async.learner.learner.Learner` that a worker calls.

    Args:
        model: whose weights are published, unchanged.
        times: of its steps.
        ledger: told where the time goes.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        times: StepTimes,
        *,
        ledger: Ledger,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.model = model
        self.policy_version = 0
        self.observer: Any = None
        self._times = times
        self._ledger = ledger
        self._sleep = sleep
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(self, batch: SampledBatch) -> StepResult:
        """Wait for as long as a step with these tokens takes.

        Raises:
            RuntimeError: if the batch was sampled for another policy version.
        """
        if batch.train_version != self.policy_version:
            raise RuntimeError(
                f"batch was sampled for policy version {batch.train_version}, "
                f"the learner is at {self.policy_version}"
            )
        started_s = time.monotonic()
        counts = count_staleness(batch)
        num_tokens = sum(len(t.token_ids) for g in batch.groups for t in g.trajectories)
        with self._ledger.part("train"):
            spent_s = time.monotonic() - started_s
            self._sleep(max(0.0, self._times.seconds(num_tokens) - spent_s))
        self.policy_version += 1
        return StepResult(
            policy_version=self.policy_version,
            skipped=False,
            metrics={
                "optimizer_steps": float(self.policy_version),
                "learner/loss_tokens": float(sum(counts.values())),
                "learner/batch_tokens": float(num_tokens),
            },
            staleness_counts=counts,
        )

    def remember(self) -> None:
        """Do nothing: there is nothing to go back from."""

    def roll_back(self) -> int:
        """Return a new policy version of the same weights."""
        self.policy_version += 1
        return self.policy_version

    def scale_rate(self, factor: float) -> None:
        """Do nothing: the weights do not change at any rate."""

    def training_state(self) -> TrainingState:
        """Return what a checkpoint holds."""
        return TrainingState(
            module=self.model,
            optimizer=self._optimizer,
            counters={"policy_version": self.policy_version},
        )

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """Go on from the counters of a :meth:`training_state`."""
        self.policy_version = int(counters["policy_version"])


def count_staleness(batch: SampledBatch) -> dict[int, int]:
    """Return the number of trained tokens by staleness, from the arrays of a batch."""
    counts: Counter[int] = Counter()
    for sampled in batch.groups:
        for trajectory in sampled.trajectories:
            versions = trajectory.policy_versions
            # Prompts and observations have version -1.
            kept = versions[versions >= max(0, sampled.min_trainable_version)]
            if len(kept) and kept[0] == kept[-1]:  # versions never fall: they are all the same
                counts[batch.train_version - int(kept[0])] += len(kept)
                continue
            values, numbers = np.unique(kept, return_counts=True)
            for version, number in zip(values.tolist(), numbers.tolist(), strict=True):
                counts[batch.train_version - version] += number
    return dict(counts)
