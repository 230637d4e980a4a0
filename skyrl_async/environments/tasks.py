"""Endless, seeded streams of tasks for environments that make their problem from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from skyrl_async.types import Task

Split = Literal["train", "heldout"]

SEEDS_PER_SPLIT = 1 << 30
"""Task seeds of training are below this number, those of held-out tasks are not."""

_STRIDE = 663_608_941
"""Odd, so that steps of this size visit every seed once; near the golden ratio of the range, so
that few steps already cover it evenly."""

_FIRST_SEED = {"train": 0, "heldout": SEEDS_PER_SPLIT}


class TaskSource:
    """Makes the tasks of one environment, one after the other, without end.

    The task at an index depends on the arguments alone. Training and held-out tasks never share a
    seed, whatever ``seed`` is, and no task repeats within 2**30 tasks. Task seeds are below 2**31.

    Args:
        environment: name of the environment; it is not loaded.
        seed: where in the range of seeds the stream starts.
        split: which range of seeds.

    Raises:
        ValueError: on an unknown split or a negative seed.
    """

    def __init__(self, environment: str, *, seed: int, split: Split = "train") -> None:
        if split not in _FIRST_SEED:
            raise ValueError(f"split must be one of {', '.join(_FIRST_SEED)}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._environment = environment
        self._seed = seed
        self._split = split
        self._start = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._index = 0

    def next(self) -> Task:
        """Return the next task; its id is ``environment/split/index``."""
        index = self._index
        self._index += 1
        return Task(
            task_id=f"{self._environment}/{self._split}/{index}",
            environment=self._environment,
            seed=_FIRST_SEED[self._split] + (self._start + index * _STRIDE) % SEEDS_PER_SPLIT,
        )

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs to go on from here; it can be written as JSON."""
        return {
            "environment": self._environment,
            "seed": self._seed,
            "split": self._split,
            "index": self._index,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            ValueError: if the state is of another environment, seed or split, or its index is not a
                number of tasks.
        """
        mine = self.state()
        for key in ("environment", "seed", "split"):
            if state.get(key) != mine[key]:
                raise ValueError(
                    f"the saved task stream has {key}={state.get(key)!r}, this run has "
                    f"{key}={mine[key]!r}; resume with the same {key} or start a new run"
                )
        index = state.get("index")
        if type(index) is not int or index < 0:
            raise ValueError(f"the saved task stream has index={index!r}; expected an int >= 0")
        self._index = index


def heldout_tasks(environment: str, num_tasks: int) -> tuple[Task, ...]:
    """Return the first ``num_tasks`` held-out tasks: the same in every run, whatever its seed.

    Raises:
        ValueError: if ``num_tasks`` is negative.
    """
    if num_tasks < 0:
        raise ValueError(f"num_tasks must be >= 0, got {num_tasks}")
    source = TaskSource(environment, seed=0, split="heldout")
    return tuple(source.next() for _ in range(num_tasks))
