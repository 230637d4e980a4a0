"""One learner rank with everything it needs in its process: policy, optimizer, publisher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.metrics.ledger import TimeLedger, fractions
from skyrl_async.types import SampledBatch, StepResult

if TYPE_CHECKING:
    from skyrl_async.weight_sync.receiving import Address
    from skyrl_async.weight_sync.transport import WeightSender

_PARTS = ("wait", "prepare", "proximal", "train", "snapshot")


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
    """

    def __init__(
        self, config: Config, *, rank: int = 0, store_address: tuple[str, int] | None = None
    ) -> None:
        self._config = config
        self._rank = rank
        self._store_address = store_address
        self._publisher: Any = None
        self._store: Any = None

    def start(self) -> Mapping[str, Any]:
        """Load the policy and join the learner group; return where this worker runs."""
        import torch

        from skyrl_async.learner.learner import Learner
        from skyrl_async.learner.policy import load_model
        from skyrl_async.learner.rank_group import RankGroup
        from skyrl_async.runtime.settings import learner_settings, policy_source
        from skyrl_async.weight_sync.snapshot import SnapshotPool

        config = self._config
        torch.set_num_threads(config.learner.num_threads)
        self._ranks = RankGroup(
            rank=self._rank,
            num_ranks=config.learner.num_ranks,
            store_address=self._store_address,
            timeout_s=config.learner.step_timeout_s,
        )
        # The learner trains in float32 whatever the engines run in: bfloat16 loses small updates.
        source = policy_source(config)
        model = load_model(replace(source, dtype="float32"))
        self._ledger = TimeLedger("learner", parts=_PARTS)
        reference = None
        if config.kl.coefficient:
            reference = load_model(replace(source, dtype="float32")).requires_grad_(False)
        self._learner = Learner(
            model,
            learner_settings(config),
            reference=reference,
            ranks=self._ranks,
            ledger=self._ledger,
        )
        self._snapshots = SnapshotPool(model.named_parameters(), dtype=getattr(torch, source.dtype))
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def open_publisher(self, *, host: str, folder: Path) -> None:
        """Start the publisher, without engines.

        Args:
            host: address to listen on, as the engines can reach it.
            folder: shared with the engines; used by the disk transport only.
        """
        from skyrl_async.weight_sync.publisher import WeightPublisher

        self._host, self._folder = host, folder
        self._publisher = WeightPublisher({}, timeout_s=self._config.weight_sync.timeout_s)

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
        """Publish the present weights to the engines that do not have them."""
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
            result = self._learner.step(batch)
            with self._ledger.part("snapshot"):
                published = self._publish(result)
        parts = fractions(self._ledger.take())
        idle = {f"idle/learner/{part}_fraction": share for part, share in parts.items()}
        return replace(result, metrics={**result.metrics, **published, **idle})

    def remember(self) -> None:
        """Keep a copy of weights and optimizer, in place of an older one."""
        self._learner.remember()

    def roll_back(self) -> int:
        """Go back to the copy under a new policy version, and publish it."""
        version = self._learner.roll_back()
        if self._publisher is not None:
            self._publisher.publish(self._snapshots.take(version))
        return version

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps."""
        self._learner.scale_rate(factor)

    def save_policy(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        from skyrl_async.learner.policy import load_tokenizer, save_policy
        from skyrl_async.runtime.settings import policy_source

        save_policy(self._learner.model, load_tokenizer(policy_source(self._config)), folder)

    def close(self) -> None:
        """Stop publishing and leave the learner group."""
        if self._publisher is not None:
            self._publisher.close()
        self._ranks.close()

    def _publish(self, result: StepResult) -> dict[str, float]:
        if self._publisher is None:
            return {}
        if not result.skipped:
            self._publisher.publish(self._snapshots.take(result.policy_version))
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
