from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_async.checkpoint import CONFIG, LEARNER, read_manifest, read_run_state
from skyrl_async.checkpoint_writer import CheckpointWriter
from skyrl_async.coordination.errors import WorkerFailed
from skyrl_async.coordination.run_state import RunState


class ShardLearner:
    """Writes one file; may fail at either call."""

    def __init__(self, *, at_start: Exception | None = None, at_end: Exception | None = None):
        self.folders: list[Path] = []
        self._at_start, self._at_end = at_start, at_end

    async def start_checkpoint(self, folder: Path) -> None:
        assert folder.parent.is_dir() and not folder.exists()
        self.folders.append(folder)
        if self._at_start is not None:
            raise self._at_start
        folder.mkdir()

    async def finish_checkpoint(self) -> None:
        if self._at_end is not None:
            raise self._at_end
        (self.folders[-1] / "shard").write_text("weights")


def make_writer(
    place: Path, learner: ShardLearner, *, on_written: Callable[[float], None] = lambda s: None
) -> CheckpointWriter:
    return CheckpointWriter(
        place, learner=learner, num_ranks=3, config="seed: 0\n", keep=2, on_written=on_written
    )


async def write(writer: CheckpointWriter, step: int) -> None:
    await writer.begin(RunState(step=step, policy_version=step - 1))
    await writer.finish()


def names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_a_checkpoint_holds_shards_state_and_configuration(tmp_path):
    seconds: list[float] = []
    asyncio.run(write(make_writer(tmp_path, ShardLearner(), on_written=seconds.append), 7))
    folder = tmp_path / "checkpoints" / "step-000007"
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.policy_version, manifest.num_ranks) == (7, 6, 3)
    assert (folder / LEARNER / "shard").read_text() == "weights"
    assert (folder / CONFIG).read_text() == "seed: 0\n"
    assert RunState.from_json(read_run_state(folder)) == RunState(step=7, policy_version=6)
    assert len(seconds) == 1 and seconds[0] > 0


def test_it_cannot_be_found_before_all_ranks_have_written(tmp_path):
    async def body() -> None:
        writer = make_writer(tmp_path, ShardLearner())
        await writer.begin(RunState(step=1))
        assert not any(name.startswith("step-") for name in names(tmp_path))
        await writer.finish()
        assert names(tmp_path) == ["step-000001"]

    asyncio.run(body())


def test_the_oldest_leave_when_a_newer_one_is_whole(tmp_path):
    async def body() -> None:
        writer = make_writer(tmp_path, ShardLearner())
        for step in (1, 2, 3):
            await writer.begin(RunState(step=step, policy_version=0))
            before = [name for name in names(tmp_path) if name.startswith("step-")]
            assert before == [f"step-{s:06d}" for s in range(max(1, step - 2), step)]
            await writer.finish()

    asyncio.run(body())
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_metrics_are_synced_before_the_checkpoint_counts(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    events = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    asyncio.run(write(make_writer(tmp_path, ShardLearner()), 1))
    assert events.index("metrics.jsonl") < events.index("rename")


@pytest.mark.parametrize("when", ["at_start", "at_end"])
def test_a_checkpoint_that_cannot_be_written_is_removed_and_those_before_it_stay(tmp_path, when):
    asyncio.run(write(make_writer(tmp_path, ShardLearner()), 5))
    full = ShardLearner(**{when: OSError("rank 1 could not write: No space left on device")})
    with pytest.raises(OSError) as failed:
        asyncio.run(write(make_writer(tmp_path, full), 9))
    assert str(failed.value) == (
        f"step 9 could not be written to {tmp_path / 'checkpoints'} (rank 1 could not write: No "
        "space left on device); the newest checkpoint there is step-000005; make room, and go on "
        "with run.resume=auto"
    )
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("when", ["at_start", "at_end"])
def test_a_learner_that_fails_otherwise_is_blamed_itself(tmp_path, when):
    dead = ShardLearner(**{when: RuntimeError("its process died")})
    with pytest.raises(WorkerFailed, match=r"^learner: its process died$"):
        asyncio.run(write(make_writer(tmp_path, dead), 9))


def test_a_folder_that_cannot_be_made_is_an_error_of_the_checkpoint(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match=r"step 3 could not be written to .* newest .* is none"):
        asyncio.run(write(make_writer(tmp_path, ShardLearner()), 3))


def test_nothing_is_finished_that_was_not_begun(tmp_path):
    with pytest.raises(RuntimeError, match="no checkpoint was begun"):
        asyncio.run(make_writer(tmp_path, ShardLearner()).finish())
