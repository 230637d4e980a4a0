"""What buffers.py puts through every replay buffer, and the Ray that its actors run on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

GROUP_SIZE = 16
FIELDS = ("token_ids", "sampled", "behavior_logprobs", "policy_versions")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is produced and taken.

    Attributes:
        trajectories: in all; a multiple of the batch.
        tokens: of each.
        producers: processes.
        batch: trajectories taken at once; a multiple of 16.
        chunk: trajectories inserted at once by the other libraries.
    """

    trajectories: int
    tokens: int
    producers: int
    batch: int
    chunk: int

    @property
    def steps(self) -> int:
        """Batches."""
        return self.trajectories // self.batch


def raw_arrays(load: Load, count: int) -> dict[str, np.ndarray]:
    """Return the arrays ``[count, tokens]`` that a producer starts from."""
    rng = np.random.default_rng(0)
    shape = (count, load.tokens)
    sampled = np.ones(shape, np.bool_)
    sampled[:, : load.tokens // 4] = False
    return {
        "token_ids": rng.integers(0, 50_000, shape, dtype=np.int32),
        "sampled": sampled,
        "behavior_logprobs": -rng.random(shape, dtype=np.float32),
        "policy_versions": np.where(sampled, np.int32(0), np.int32(-1)),
    }


def start_ray() -> None:
    import ray

    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = f"{here.parent}:{here.parents[2]}"  # of the actors' processes
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=1 << 30,
        log_to_driver=False,
        logging_level="ERROR",
    )
