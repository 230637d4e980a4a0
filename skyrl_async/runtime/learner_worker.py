"""One learner rank with everything it needs in its process: policy, optimizer, publisher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.lab.late_publishing import LatePublishing
from skyrl_async.metrics.ledger import TimeLedger
from skyrl_async.metrics.trace import open_tracer
from skyrl_async.types import SampledBatch, StepResult

if TYPE_CHECKING:
    from skyrl_async.weight_sync.receiving import Address
    from skyrl_async.weight_sync.transport import WeightSender

_PARTS = ("wait", "prepare", "proximal", "train", "step", "snapshot", "checkpoint")


class LearnerWorker:
    """Builds one rank of the learner group from the configuration; rank 0 publishes.

    ::

        worker = LearnerWorker(config, rank=0)
        worker.start()
        worker.open_publisher(host="127.0.0.1", folder=...)
        address = worker.open_pair(engine_id)      # for the receiver beside that engine
        result = worker.step(batch)                # publishes in the background
        worker.save_policy(folder)
        worker.close()

    Args:
        config: of the run.
        rank: in the learner group.
        store_address: where rank 0 hosts the group's store; needed with several ranks.
        resume_from: checkpoint to go on from; without one, training begins.
        folder: of the run, for the timeline; None leaves none.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        store_address: tuple[str, int] | None = None,
        resume_from: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self._config = config
        self._tracer = open_tracer(None, process="")
        self._run_folder = folder if config.logging.trace else None
        self._resume_from = resume_from
        self._rank = rank
        self._store_address = store_address
        self._publisher: Any = None
        self._late = LatePublishing(self._hand_over, lag=config.lab.exact_lag or 0)
        self._snapshots: Any = None
        self._gatherer: Any = None
        self._store: Any = None

    def start(self) -> Mapping[str, Any]:
        """Load the policy and join the learner group; return where this worker runs."""
        import torch

        from skyrl_async.runtime.learner_build import build_ranks

        config = self._config
        torch.set_num_threads(config.learner.num_threads)
        self._ranks = build_ranks(config, rank=self._rank, store_address=self._store_address)
        self._tracer = open_tracer(self._run_folder, process=f"learner {self._rank}")
        self._lane = self._tracer.lane(role="learner", name=f"rank {self._rank}")
        self._ledger = TimeLedger("learner", parts=_PARTS, lane=self._lane)
        self._learner = self._build_learner()
        self._open_checkpoints()
        self._make_snapshots()
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def _build_learner(self) -> Any:
        """Return the learner, or what takes its time."""
        if self._config.simulate.learner:
            from skyrl_async.runtime.simulated import build_simulated_learner

            return build_simulated_learner(self._config, ledger=self._ledger)
        from skyrl_async.runtime.learner_build import build_learner

        return build_learner(self._config, self._ranks, ledger=self._ledger)

    def _make_snapshots(self) -> None:
        """Prepare to copy the weights that this rank has its part of."""
        import torch

        from skyrl_async.runtime.learner_build import export_of, sharded_weights, whole_weights
        from skyrl_async.runtime.settings import policy_source
        from skyrl_async.weight_sync.gathering import ShardGatherer

        config, ranks, model = self._config, self._ranks, self._learner.model
        adapter_alone = config.lora.rank > 0 and config.lora.publish == "adapter"
        if adapter_alone or ranks.shard_ranks == 1:
            if self._rank == 0:
                self._snapshots = whole_weights(config, model)
            return
        group = ranks.new_shard_group()
        if ranks.is_replica:
            return
        self._gatherer = ShardGatherer(
            sharded_weights(model),
            group=group,
            publish=self._hand_over,
            dtype=getattr(torch, policy_source(config).dtype),
            export=export_of(config),
            timeout_s=config.learner.step_timeout_s,
        )
        # So that there is something to give to engines from the start.
        self._gatherer.take(self._learner.policy_version)

    def _hand_over(self, snapshot: Any) -> None:
        if self._publisher is None:
            snapshot.release()
        else:
            self._publisher.publish(snapshot)

    def open_publisher(self, *, host: str, folder: Path) -> None:
        """Start the publisher, without engines.

        Args:
            host: address to listen on, as the engines can reach it.
            folder: shared with the engines; used by the disk transport only.
        """
        from skyrl_async.weight_sync.publisher import WeightPublisher

        self._host, self._folder = host, folder
        self._publisher = WeightPublisher(
            {}, timeout_s=self._config.weight_sync.timeout_s, tracer=self._tracer
        )

    def record_samples(self, path: Path) -> None:
        """Append a few trajectories to a file now and then, as the configuration says."""
        from skyrl_async.runtime.sample_recorder import SampleRecorder

        if self._config.logging.samples_every_steps and not self._config.simulate.learner:
            self._learner.observer = SampleRecorder(self._config, self._learner, path)

    def open_pair(self, engine_id: str) -> Address:
        """Make a sender for an engine, in place of an old one; return where it is found."""
        sender, address = self._make_sender(engine_id)
        self._publisher.remove_engine(engine_id)
        self._publisher.add_engine(engine_id, sender)
        return address

    def close_pair(self, engine_id: str) -> None:
        """Give up the sender of an engine, also in the middle of a transfer."""
        self._publisher.remove_engine(engine_id)

    def publish_newest(self) -> None:
        """Publish the newest weights that can be had to the engines that do not have them."""
        if self._gatherer is not None:
            self._gatherer.publish_newest(timeout_s=self._config.weight_sync.timeout_s)
        else:
            self._publisher.publish(self._snapshots.take(self._learner.policy_version))

    def _make_sender(self, engine_id: str) -> tuple[WeightSender, Address]:
        from skyrl_async.weight_sync.collective import CollectiveSender
        from skyrl_async.weight_sync.disk import DiskSender
        from skyrl_async.weight_sync.pair import host_store
        from skyrl_async.weight_sync.sglang_direct import DirectSender

        settings = self._config.weight_sync
        if settings.transport == "disk":
            place = self._folder / engine_id.replace(" ", "_")
            return DiskSender(place), place
        if self._store is None:
            self._store = host_store(self._host)
        options: dict[str, Any] = {
            "store": self._store,
            "bucket_bytes": settings.bucket_bytes,
            "host": self._host,
            "max_bytes_per_s": settings.max_bytes_per_s,
        }
        engine = self._config.engine
        if engine.kind == "sglang" and engine.weight_load == "direct":
            direct = DirectSender(engine_id, **options)
            return direct, direct.address
        sender = CollectiveSender(engine_id, **options)
        return sender, sender.address

    def step(self, batch: SampledBatch) -> StepResult:
        """Train on a batch and hand the new weights to the publisher.

        Raises:
            RuntimeError: if the publisher failed, or lost the engine of a rollout actor.
        """
        with self._ledger.part("prepare"):
            started_s = self._ledger.since_s
            result = self._learner.step(batch)
            with self._ledger.part("snapshot"):
                published = self._publish(result)
        self._draw(result, started_s, self._ledger.since_s)
        metrics = {**result.metrics, **published}
        return replace(result, metrics=metrics, seconds=self._ledger.take())

    def _draw(self, result: StepResult, started_s: float, ended_s: float) -> None:
        """Put the whole step on the timeline, around its parts."""
        version, tokens = result.policy_version, sum(result.staleness_counts.values())
        args = {"policy_version": version, "tokens": tokens}
        self._lane.span("learner step", started_s, ended_s, args)
        if not result.skipped:
            self._lane.flow("made", policy_version=version, time_s=ended_s)

    def remember(self) -> None:
        """Keep a copy of weights and optimizer, in place of an older one."""
        self._learner.remember()

    def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and publish it."""
        version = self._learner.roll_back()
        self._take_snapshot(version)
        return version

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps."""
        self._learner.scale_rate(factor)

    def _open_checkpoints(self) -> None:
        """Go on from a checkpoint, if there is one to go on from, and be ready to write others."""
        from skyrl_async.checkpoint import LEARNER
        from skyrl_async.learner.training_state import StateWriter, load_training_state

        num_ranks = self._config.learner.num_ranks
        if self._resume_from is not None:
            counters = load_training_state(
                self._learner.training_state(),
                self._resume_from / LEARNER,
                rank=self._rank,
                num_ranks=num_ranks,
            )
            if not self._config.guard.enabled:
                # Without the guard, nothing but the configuration says what the rates are.
                lowered = {name for name in counters if name.endswith("rate_factor")}
                counters = {n: 1.0 if n in lowered else value for n, value in counters.items()}
            self._learner.restore_counters(counters)
        self._writer = StateWriter(
            rank=self._rank, num_ranks=num_ranks, timeout_s=self._config.checkpoint.timeout_s
        )

    def start_checkpoint(self, folder: Path) -> None:
        """Copy this rank's training state and begin to write it in the background.

        Args:
            folder: that all ranks share.
        """
        with self._ledger.part("checkpoint"):
            self._writer.start(self._learner.training_state(), folder)

    def finish_checkpoint(self) -> None:
        """Wait until all ranks have written; another thread may train meanwhile.

        Raises:
            OSError: if one could not.
        """
        self._writer.finish()

    def save_policy(self, folder: Path) -> None:
        """Write the policy in Hugging Face format; all ranks call this, and rank 0 writes.

        A simulated learner has trained none, so nothing is written.
        """
        from skyrl_async.runtime.learner_build import save_whole_policy

        if self._config.simulate.learner:
            return
        save_whole_policy(self._learner, self._config, self._ranks, folder)

    def close(self) -> None:
        """Stop publishing and leave the learner group."""
        if self._gatherer is not None:
            self._gatherer.close()
        if self._publisher is not None:
            self._publisher.close()
        self._late.close()
        self._ranks.close()
        self._tracer.close()

    def _take_snapshot(self, policy_version: int) -> None:
        """Hand the weights as they are now to what publishes them in the background."""
        if self._gatherer is not None:
            self._gatherer.take(policy_version)
        elif self._publisher is not None:
            self._late.publish(self._snapshots.take(policy_version))

    def _publish(self, result: StepResult) -> dict[str, float]:
        if not result.skipped:
            self._take_snapshot(result.policy_version)
        if self._gatherer is not None:
            self._gatherer.check()
        if self._publisher is None:
            return {}
        self._publisher.check()
        stats = self._publisher.take_stats()
        # Engines that are workers of their own come back by themselves.
        if stats.lost_engines and self._config.engine.kind == "embedded":
            raise RuntimeError(f"publishing lost {', '.join(stats.lost_engines)}")
        return {
            "sync/bytes": stats.size_bytes,
            "sync/transfer_s": stats.transfer_s,
            "sync/versions_skipped": stats.versions_skipped,
            "sync/rejections": stats.num_rejections,
            "sync/lost_engines": len(stats.lost_engines),
        }
