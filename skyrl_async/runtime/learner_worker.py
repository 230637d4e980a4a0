"""One learner rank with everything it needs in its process: policy, optimizer, publisher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.metrics.ledger import TimeLedger, fractions
from skyrl_async.types import SampledBatch, StepResult

if TYPE_CHECKING:
    from skyrl_async.weight_sync.collective import PairAddress

_PARTS = ("wait", "prepare", "proximal", "train", "snapshot")


class LearnerWorker:
    """Builds one rank of the learner group from the configuration; rank 0 publishes.

    ::

        worker = LearnerWorker(config, rank=0)
        worker.start()
        addresses = worker.open_publisher(engine_ids, host="127.0.0.1", folder=...)
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
        self._learner = Learner(
            model, learner_settings(config), ranks=self._ranks, ledger=self._ledger
        )
        self._snapshots = SnapshotPool(model.named_parameters(), dtype=getattr(torch, source.dtype))
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def open_publisher(
        self, engine_ids: Sequence[str], *, host: str, folder: Path
    ) -> dict[str, PairAddress | Path]:
        """Start the publisher; return where the receiver beside each engine finds its sender.

        Args:
            engine_ids: of the training pool.
            host: address to listen on, as the engines can reach it.
            folder: shared with the engines; used by the disk transport only.
        """
        from skyrl_async.weight_sync.collective import CollectiveSender, host_store
        from skyrl_async.weight_sync.disk import DiskSender
        from skyrl_async.weight_sync.publisher import WeightPublisher

        settings = self._config.weight_sync
        senders: dict[str, Any] = {}
        addresses: dict[str, PairAddress | Path] = {}
        if settings.transport == "disk":
            for engine_id in engine_ids:
                addresses[engine_id] = place = folder / engine_id.replace(" ", "_")
                senders[engine_id] = DiskSender(place)
        else:
            store = host_store(host)
            for engine_id in engine_ids:
                sender = CollectiveSender(
                    engine_id, store=store, bucket_bytes=settings.bucket_bytes, host=host
                )
                senders[engine_id], addresses[engine_id] = sender, sender.address
        self._publisher = WeightPublisher(senders, timeout_s=settings.timeout_s)
        return addresses

    def step(self, batch: SampledBatch) -> StepResult:
        """Train on a batch and hand the new weights to the publisher.

        Raises:
            RuntimeError: if the publisher failed or lost an engine.
        """
        with self._ledger.part("prepare"):
            result = self._learner.step(batch)
            with self._ledger.part("snapshot"):
                published = self._publish(result)
        parts = fractions(self._ledger.take())
        idle = {f"idle/learner/{part}_fraction": share for part, share in parts.items()}
        return replace(result, metrics={**result.metrics, **published, **idle})

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
        if stats.lost_engines:
            raise RuntimeError(f"publishing lost {', '.join(stats.lost_engines)}")
        return {
            "sync/bytes": stats.size_bytes,
            "sync/transfer_s": stats.transfer_s,
            "sync/versions_skipped": stats.versions_skipped,
        }
