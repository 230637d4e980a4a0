"""The run as Ray actors, on this machine or on the nodes of a cluster."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from skyrl_async.config import Config
from skyrl_async.coordination.coordinator import WorkerFailed
from skyrl_async.coordination.engine_fleet import EngineReport
from skyrl_async.resume import Resume, start_version
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.runtime.engine_worker import EngineWorker, server_names
from skyrl_async.runtime.heap import freeze_heap
from skyrl_async.runtime.learner_worker import LearnerWorker
from skyrl_async.runtime.ray_groups import (
    PlacedBatch,
    Tokens,
    gather_batch,
    object_store_bytes,
    place_batch,
    place_report,
    split_report,
)
from skyrl_async.runtime.rollout_worker import RolloutWorker, engine_name
from skyrl_async.types import (
    Assignment,
    EvaluationResult,
    RolloutReport,
    SampledBatch,
    StepResult,
    Task,
)
from skyrl_async.weight_sync.receiving import Address

_CHECKPOINT = "checkpoint"


class RayRolloutActor(RolloutWorker):
    """The Ray actor around a rollout worker: an asyncio actor, whose methods interleave."""

    async def where(self) -> dict[str, Any]:
        """Load everything; return where this actor runs."""
        place = await self.start()
        freeze_heap()
        return {**place, "node": ray.get_runtime_context().get_node_id()}

    async def poll_split(self, *, wait_s: float) -> tuple[RolloutReport, Tokens]:
        """Return what happened since the last report, and the tokens apart from it."""
        return split_report(await self.poll(wait_s=wait_s))


class RayEngineWorker(EngineWorker):
    """The Ray actor around the worker beside an SGLang server: an asyncio actor."""

    async def where(self) -> dict[str, Any]:
        """Start the server; return where this actor runs.

        On a cluster it listens on its node's address, because rollout actors may be elsewhere.
        """
        alone = self._config.cluster.address is None
        host = "127.0.0.1" if alone else ray.util.get_node_ip_address()
        return {**await self.start(host=host), "node": ray.get_runtime_context().get_node_id()}


class RayLearnerRank(LearnerWorker):
    """The Ray actor around a learner rank."""

    def where(self) -> dict[str, Any]:
        """Load everything; return where this actor runs."""
        place = self.start()
        freeze_heap()
        return {**place, "node": ray.get_runtime_context().get_node_id()}

    def step_placed(self, placed: PlacedBatch, *objects: Tokens) -> StepResult:
        """Train on a batch whose tokens Ray has fetched."""
        return self.step(gather_batch(placed, objects))

    def address(self) -> str:
        """Return the address of this actor's node, as other nodes reach it."""
        return ray.util.get_node_ip_address()

    def set_store(self, address: tuple[str, int]) -> None:
        """Tell where the learner group's store is, before ``where``."""
        self._store_address = address

    def free_port(self) -> int:
        """Return a port of this actor's node that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])


class RemoteRollout:
    """A rollout actor as the coordinator sees it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._poll = handle.poll_split.options(num_returns=2)

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start to play."""
        await _answer(self._handle.submit.remote(list(assignments)))

    async def poll(self, *, wait_s: float) -> RolloutReport:
        """Return what happened since the last report."""
        report, tokens = self._poll.remote(wait_s=wait_s)
        return place_report(await _answer(report), tokens)

    async def evaluate(
        self, tasks: Sequence[Task], *, endpoint: EngineEndpoint | None = None
    ) -> EvaluationResult:
        """Play greedily with the weights that its engine, or the one at ``endpoint``, has now."""
        return await _answer(self._handle.evaluate.remote(tasks, endpoint=endpoint))

    async def set_engines(self, endpoints: Sequence[EngineEndpoint]) -> None:
        """Play with these engines from now on."""
        await _answer(self._handle.set_engines.remote(list(endpoints)))


class RemoteEngine:
    """The worker beside an SGLang server as the fleet sees it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def poll(self, *, wait_s: float) -> EngineReport:
        """Return how the engine is."""
        return await _answer(self._handle.poll.remote(wait_s=wait_s))

    async def connect(self, address: Address) -> None:
        """Make the receiver's end of a new pair."""
        await _answer(self._handle.connect.remote(address))

    async def pin(self) -> EngineReport:
        """Keep the weights as they are."""
        return await _answer(self._handle.pin.remote())


class RemoteLearner:
    """All learner ranks as the coordinator sees them."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    async def step(self, batch: SampledBatch) -> StepResult:
        """Train on a batch, on all ranks."""
        placed, references = place_batch(batch)
        calls = [
            _named_answer(f"learner {rank}", handle.step_placed.remote(placed, *references))
            for rank, handle in enumerate(self._handles)
        ]
        return (await asyncio.gather(*calls))[0]

    async def open_pair(self, engine_id: str) -> Address:
        """Make a new sender for an engine; return its address."""
        return await _answer(self._handles[0].open_pair.remote(engine_id))

    async def close_pair(self, engine_id: str) -> None:
        """Give up the sender of an engine."""
        await _answer(self._handles[0].close_pair.remote(engine_id))

    async def publish_newest(self) -> None:
        """Publish the present weights to the engines that do not have them."""
        await _answer(self._handles[0].publish_newest.remote())

    async def remember(self) -> None:
        """Keep a copy of weights and optimizer, on all ranks."""
        await asyncio.gather(*(_answer(handle.remember.remote()) for handle in self._handles))

    async def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and publish it."""
        versions = [_answer(handle.roll_back.remote()) for handle in self._handles]
        return (await asyncio.gather(*versions))[0]

    async def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps, on all ranks."""
        calls = [_answer(handle.scale_rate.remote(factor)) for handle in self._handles]
        await asyncio.gather(*calls)

    async def start_checkpoint(self, folder: Path) -> None:
        """Copy the training state on all ranks, and begin to write it."""
        calls = [_answer(handle.start_checkpoint.remote(folder)) for handle in self._handles]
        await asyncio.gather(*calls)

    async def finish_checkpoint(self) -> None:
        """Return when all ranks have written; steps may go on meanwhile."""
        calls = [
            _answer(handle.finish_checkpoint.options(concurrency_group=_CHECKPOINT).remote())
            for handle in self._handles
        ]
        await asyncio.gather(*calls)

    async def save_policy(self, folder: Path) -> None:
        """Write the policy in Hugging Face format; all ranks give their part of it."""
        calls = [_answer(handle.save_policy.remote(folder)) for handle in self._handles]
        await asyncio.gather(*calls)


class RayRuntime:
    """Builds all workers as Ray actors; see :class:`skyrl_async.run.Runtime`.

    Args:
        config: of the run.
        folder: of the run; on a cluster it must be shared by all nodes.
        resume: where the run goes on, if it does not begin.
    """

    def __init__(self, config: Config, *, folder: Path, resume: Resume | None = None) -> None:
        self._resume = resume
        self._config = config
        self._folder = folder
        self._learners: list[Any] = []
        self._actors: dict[str, Any] = {}
        self._engine_actors: dict[str, Any] = {}
        self.learner: RemoteLearner
        self.rollouts: Mapping[str, RemoteRollout] = {}
        self.engines: Mapping[str, RemoteEngine] = {}

    async def start(self, status: Callable[[str], None]) -> Mapping[str, Any]:
        """Start Ray and all actors and connect the engines; return where each worker runs.

        Raises:
            TimeoutError: if the workers are not ready within ``cluster.startup_timeout_s``.
        """
        config = self._config
        remote = config.cluster.address is not None
        status(f"connecting to Ray at {config.cluster.address}" if remote else "starting Ray")
        await asyncio.to_thread(self._init_ray)
        status("starting workers, loading torch and the policy")
        self._create_actors()
        self.learner = RemoteLearner(self._learners)
        self.rollouts = {name: RemoteRollout(handle) for name, handle in self._actors.items()}
        self.engines = {name: RemoteEngine(handle) for name, handle in self._engine_actors.items()}
        try:
            async with asyncio.timeout(config.cluster.startup_timeout_s):
                return await self._start_workers(status)
        except TimeoutError:
            raise TimeoutError(
                f"the workers were not ready after cluster.startup_timeout_s="
                f"{config.cluster.startup_timeout_s:g} s; Ray has {ray.available_resources()} free "
                f"of {ray.cluster_resources()}"
            ) from None

    async def close(self) -> None:
        """Stop all workers; leave a cluster that others started, end one that this run started."""
        handles = (*self._actors.values(), *self._engine_actors.values(), *self._learners)
        closing = [handle.close.remote() for handle in handles]
        if closing:
            await asyncio.to_thread(ray.wait, closing, num_returns=len(closing), timeout=1.5)
        for handle in handles:
            ray.kill(handle)
        await asyncio.to_thread(ray.shutdown)

    def _init_ray(self) -> None:
        config = self._config
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if config.cluster.address is not None:
            ray.init(address=config.cluster.address, **common)
            return
        needed = (
            config.cluster.learner_cpus * config.learner.num_ranks
            + config.cluster.actor_cpus * config.rollout.num_actors
            + config.cluster.engine_cpus * len(server_names(config))
        )
        os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
        ray.init(
            # Without it Ray joins a cluster that it finds here, for example of a run just killed.
            address="local",
            num_cpus=max(int(needed + 0.999), os.cpu_count() or 1),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=object_store_bytes(config.replay.capacity_bytes),
            **common,
        )

    def _create_actors(self) -> None:
        config = self._config
        # Waiting for a checkpoint has a thread of its own, so that steps go on meanwhile.
        threads: dict[str, Any] = {"concurrency_groups": {_CHECKPOINT: 1}}
        num_gpus = config.cluster.learner_gpus if config.learner.device == "cuda" else 0
        learner_class = ray.remote(**threads)(RayLearnerRank).options(
            num_cpus=config.cluster.learner_cpus,
            num_gpus=num_gpus,
            scheduling_strategy=self._learner_placement(num_gpus),
        )
        resume_from = self._resume.checkpoint if self._resume is not None else None
        self._learners = [
            learner_class.remote(config, rank=rank, resume_from=resume_from, folder=self._folder)
            for rank in range(config.learner.num_ranks)
        ]
        spread = config.cluster.address is not None and config.cluster.spread
        actor_class = ray.remote(RayRolloutActor).options(
            num_cpus=config.cluster.actor_cpus,
            num_gpus=config.engine.gpus_per_engine if config.engine.kind == "embedded" else 0,
            max_concurrency=1000,
            scheduling_strategy="SPREAD" if spread else "DEFAULT",
        )
        for index in range(config.rollout.num_actors):
            self._actors[engine_name(index)] = actor_class.remote(
                config,
                index=index,
                start_version=start_version(self._resume),
                folder=self._folder,
            )
        engine_class = ray.remote(RayEngineWorker).options(
            num_cpus=config.cluster.engine_cpus,
            num_gpus=config.engine.gpus_per_engine,
            max_concurrency=100,
            scheduling_strategy="SPREAD" if spread else "DEFAULT",
        )
        for index, name in enumerate(server_names(config)):
            self._engine_actors[name] = engine_class.remote(
                config, index=index, folder=self._folder
            )

    def _learner_placement(self, num_gpus: float) -> Any:
        """Keep ranks together: a single one on this node, several packed onto few nodes."""
        cluster, num_ranks = self._config.cluster, self._config.learner.num_ranks
        if num_ranks == 1:
            node = ray.get_runtime_context().get_node_id()
            return NodeAffinitySchedulingStrategy(node, soft=True)
        bundle = {"CPU": cluster.learner_cpus, **({"GPU": num_gpus} if num_gpus else {})}
        group = ray.util.placement_group([bundle] * num_ranks, strategy="PACK")
        return PlacementGroupSchedulingStrategy(group)

    async def _start_workers(self, status: Callable[[str], None]) -> Mapping[str, Any]:
        host = await self._bind_address()
        if len(self._learners) > 1:
            address = (host, await _answer(self._learners[0].free_port.remote()))
            await asyncio.gather(*(_answer(h.set_store.remote(address)) for h in self._learners))
        named = {f"learner {rank}": handle for rank, handle in enumerate(self._learners)}
        named.update(self._actors)
        named.update(self._engine_actors)
        places = await asyncio.gather(
            *(_named_answer(name, handle.where.remote()) for name, handle in named.items())
        )
        status("connecting the engines to the publisher")
        await _answer(
            self._learners[0].open_publisher.remote(host=host, folder=self._folder / "weights")
        )
        await _answer(self._learners[0].record_samples.remote(self._folder / "samples.jsonl"))
        if not self._engine_actors:
            for name, handle in self._actors.items():
                await _answer(handle.connect.remote(await self.learner.open_pair(name)))
            if self._resume is not None:
                # Engines have the initial weights; the coordinator lets none play before these.
                await self.learner.publish_newest()
        return dict(zip(named, places, strict=True))

    async def _bind_address(self) -> str:
        """Return loopback for a cluster of this machine alone, else the learner's node address."""
        if self._config.cluster.address is None:
            return "127.0.0.1"
        return await _answer(self._learners[0].address.remote())


async def _answer(reference: Any) -> Any:
    """Await a Ray call; errors keep their own type and one line of text."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"its process died: {_first_line(error)}") from None


async def _named_answer(name: str, reference: Awaitable[Any]) -> Any:
    try:
        return await _answer(reference)
    except Exception as error:
        raise WorkerFailed(f"{name}: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
