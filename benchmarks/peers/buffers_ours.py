"""Our side of buffers.py: the product's coordinator, admission, buffer and handles."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from buffers_load import FIELDS, GROUP_SIZE, Load, raw_arrays, start_ray

MAX_STALENESS = 3


def make_group(group_id: int, version: int, raw: dict[str, np.ndarray]) -> Any:
    """Return a group of our records, sampled by ``version``."""
    from skyrl_async.types import Trajectory, TrajectoryGroup, TrajectoryStatus

    members = tuple(
        Trajectory(
            token_ids=raw["token_ids"][i],
            sampled=raw["sampled"][i],
            behavior_logprobs=raw["behavior_logprobs"][i],
            policy_versions=raw["policy_versions"][i] + np.int32(version) * raw["sampled"][i],
            temperature=1.0,
            reward=float(i % 2),
            status=TrajectoryStatus.TERMINATED,
            num_turns=1,
        )
        for i in range(GROUP_SIZE)
    )
    return TrajectoryGroup(group_id=group_id, task_id=str(group_id), trajectories=members)


class Producer:
    """A rollout actor whose groups are finished at once."""

    def __init__(self, load: Load) -> None:
        self._raw = raw_arrays(load, GROUP_SIZE)
        for array in self._raw.values():
            array.setflags(write=False)
        self._finished: list[Any] = []
        self._news = asyncio.Event()
        self._version = 0

    async def loaded(self, version: int) -> None:
        """Have new weights, as after a swap: wakes a waiting report."""
        self._version = version
        self._news.set()

    async def ready(self) -> None:
        """Return when the actor is there, with its imports."""
        make_group(0, 0, self._raw)

    async def submit(self, assignments: Any) -> None:
        """Make the groups."""
        for one in assignments:
            group = make_group(one.group_id, self._version, self._raw)
            self._finished.append(group)
        self._news.set()

    async def poll_split(self, *, wait_s: float) -> Any:
        """Return what was made since the last report."""
        from skyrl_async.runtime.ray_groups import split_report
        from skyrl_async.types import RolloutReport

        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        groups, self._finished = tuple(self._finished), []
        return split_report(RolloutReport(engine_version=self._version, groups=groups))


class Learner:
    """A learner that adds up what it gets, and tells the actors the new version."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self.total = 0.0

    def ready(self) -> None:
        """Return when the actor is there, with its imports."""
        import skyrl_async.types  # noqa: F401

    def step_placed(self, placed: Any, *objects: Any) -> Any:
        """Add up all arrays."""
        from skyrl_async.runtime.ray_groups import gather_batch
        from skyrl_async.types import StepResult

        batch = gather_batch(placed, objects)

        for sampled in batch.groups:
            for trajectory in sampled.trajectories:
                self.total += sum(float(getattr(trajectory, name).sum()) for name in FIELDS)
        for actor in self._actors:
            actor.loaded.remote(batch.train_version + 1)
        return StepResult(
            policy_version=batch.train_version + 1,
            skipped=False,
            metrics={},
            staleness_counts={},
        )


class Tasks:
    """Endless tasks that nobody has to play."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> Any:
        """Return a task."""
        from skyrl_async.types import Task

        self._count += 1
        return Task(task_id=str(self._count), environment="none", seed=self._count)

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


class TimedLearner:
    """The learner in the coordinator's eyes; keeps when its last step ended."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote
        self.ended_s = 0.0

    async def step(self, batch: Any) -> Any:
        """Train remotely."""
        result = await self._remote.step(batch)
        self.ended_s = time.perf_counter()
        return result


def ours(load: Load) -> float:
    """Return the seconds of the product's path."""
    import ray

    from skyrl_async.runtime.ray_runtime import RemoteLearner, RemoteRollout

    start_ray()
    actor = ray.remote(Producer).options(num_cpus=0, max_concurrency=1000)
    actors = [actor.remote(load) for _ in range(load.producers)]
    learner = ray.remote(Learner).options(num_cpus=0).remote(actors)
    ray.get([handle.ready.remote() for handle in (*actors, learner)])
    rollouts = {str(i): RemoteRollout(handle) for i, handle in enumerate(actors)}
    return asyncio.run(coordinate(load, TimedLearner(RemoteLearner([learner])), rollouts))


async def coordinate(load: Load, learner: TimedLearner, rollouts: Any) -> float:
    from skyrl_async.coordination.coordinator import Coordinator, CoordinatorSettings
    from skyrl_async.coordination.run_metrics import RunMetrics
    from skyrl_async.metrics.recorder import Recorder

    coordinator = Coordinator(
        tasks=Tasks(),
        groups=make_ledger(load),
        rollouts=rollouts,
        learner=learner,
        metrics=RunMetrics(Recorder([]), clock=time.monotonic),
        settings=CoordinatorSettings(steps=load.steps),
        clock=time.monotonic,
    )
    started = time.perf_counter()
    await coordinator.run()
    return learner.ended_s - started


def make_ledger(load: Load) -> Any:
    from skyrl_async.coordination.admission import Admission
    from skyrl_async.coordination.ledger import GroupLedger
    from skyrl_async.coordination.staleness import StalenessRule
    from skyrl_async.replay.buffer import ReplayBuffer

    groups = load.batch // GROUP_SIZE
    rule = StalenessRule(name="mask", max_staleness=MAX_STALENESS, groups_per_step=groups)
    admission = Admission(
        groups_per_step=groups,
        max_staleness=MAX_STALENESS,
        largest_group_bytes=GROUP_SIZE * (512 + 13 * load.tokens),
        capacity_bytes=1 << 30,
    )
    return GroupLedger(
        rule=rule, admission=admission, buffer=ReplayBuffer(groups_per_step=groups, rule=rule)
    )


def ours_alone(load: Load) -> float:
    ledger = make_ledger(load)
    raw = raw_arrays(load, GROUP_SIZE)
    per_step = load.batch // GROUP_SIZE
    groups = [[make_group(s * per_step + i, s, raw) for i in range(per_step)]
              for s in range(load.steps)]  # fmt: skip
    ledger.engine_joined("engine", 0)
    started = time.perf_counter()
    for version, made in enumerate(groups):
        for group in made:
            slot = ledger.try_admit()
            if slot is None or slot.group_id != group.group_id:
                raise RuntimeError(f"admission gave {slot} for group {group.group_id}")
            ledger.insert(group)
        batch = ledger.sample(version).batch
        if batch is None:
            raise RuntimeError("the buffer gave no batch")
        ledger.commit(batch, version + 1)
        ledger.engine_loaded("engine", version + 1)
    return time.perf_counter() - started
