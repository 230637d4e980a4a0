import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrl_async.weight_sync.disk import DiskReceiver, DiskSender
from skyrl_async.weight_sync.publisher import WeightPublisher
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    StagedWeights,
    TransferRejected,
)
from tests.weight_sync.other_process import process, told, write_and_die_before_rename
from tests.weight_sync.peers import (
    PointerEngine,
    assert_same_bits,
    in_thread,
    make_parameters,
    soon,
)

SMALL = 1_000


def test_published_versions_arrive_bit_equal_and_old_ones_are_pruned(tmp_path: Path) -> None:
    parameters = make_parameters(num_floats=SMALL)
    pool, engine = SnapshotPool(parameters), PointerEngine(parameters)
    receiver = WeightReceiver(DiskReceiver(tmp_path, expected=pool.layout), engine.load)
    publisher = WeightPublisher({"a": DiskSender(tmp_path)}, timeout_s=5)
    for version in range(5):
        for _, tensor in parameters:
            tensor.add_(1)
        expected = {name: tensor.clone() for name, tensor in parameters}
        publisher.publish(pool.take(version))
        assert publisher.wait_idle(5)
        assert_same_bits(engine.live, expected)
    publisher.close()
    receiver.close()
    assert engine.loaded == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answer-00000004.json",
        "answer-00000005.json",
        "transfer-00000004",
        "transfer-00000005",
    ]


def stage(tmp_path: Path, pool: SnapshotPool, **options: int) -> StagedWeights | None:
    return DiskReceiver(tmp_path, expected=pool.layout, **options).receive(0.0)


def write(sender: DiskSender, pool: SnapshotPool, policy_version: int) -> None:
    snapshot = pool.take(policy_version)
    with pytest.raises(EngineLost, match="no answer"):
        sender.send(snapshot, deadline=time.monotonic())
    snapshot.release()


def test_receiver_that_starts_late_finds_the_newest_version(tmp_path: Path) -> None:
    pool = SnapshotPool(make_parameters(num_floats=SMALL))
    for version in (1, 2, 3):
        write(DiskSender(tmp_path), pool, version)
    staged = stage(tmp_path, pool)
    assert staged is not None and staged.policy_version == 3
    assert stage(tmp_path, pool, policy_version=3) is None


@pytest.mark.parametrize(
    "damage", ["bit", "truncated", "renamed", "retyped", "missing", "manifest"]
)
def test_damaged_files_are_rejected_and_a_good_version_follows(tmp_path: Path, damage: str) -> None:
    pool = SnapshotPool(make_parameters(num_floats=SMALL))
    write(DiskSender(tmp_path), pool, 1)
    transfer = tmp_path / "transfer-00000001"
    weights = transfer / "weights.safetensors"
    if damage == "bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        (transfer / "manifest.json").write_text("{")
    else:
        tensors = load_file(weights)
        scale = tensors.pop("scale")
        tensors["scale" if damage == "retyped" else "other"] = scale.double()
        save_file(tensors, weights)
    receiver = DiskReceiver(tmp_path, expected=pool.layout)
    assert receiver.receive(0.0) is None
    assert '"retryable": true' in (tmp_path / "answer-00000001.json").read_text()
    sender = DiskSender(tmp_path)
    sending = in_thread(lambda: sender.send(pool.take(1), deadline=soon()))
    staged = receiver.receive(5.0)
    assert staged is not None
    receiver.acknowledge(staged, None)
    assert sending()[0].size_bytes == pool.layout.size_bytes


def test_other_layout_and_old_versions_are_refused(tmp_path: Path) -> None:
    parameters = make_parameters(num_floats=SMALL)
    pool = SnapshotPool(parameters)
    receiver = DiskReceiver(tmp_path, expected=SnapshotPool(parameters[1:]).layout)
    sender = DiskSender(tmp_path)
    sending = in_thread(lambda: sender.send(pool.take(1), deadline=soon()))
    assert receiver.receive(2.0) is None
    error, _ = sending()
    assert isinstance(error, TransferRejected) and not error.retryable
    sending = in_thread(lambda: sender.send(pool.take(1), deadline=soon()))
    newer = DiskReceiver(tmp_path, expected=pool.layout, policy_version=1)
    while newer.receive(0.1) is None and not list(tmp_path.glob("answer-00000002.json")):
        pass
    error, _ = sending()
    assert isinstance(error, TransferRejected) and "not above 1" in str(error)


def test_sender_killed_between_write_and_rename_leaves_the_old_version(tmp_path: Path) -> None:
    pool = SnapshotPool(make_parameters(num_floats=SMALL))
    receiver = DiskReceiver(tmp_path, expected=pool.layout)
    with process(write_and_die_before_rename, tmp_path) as (child, pipe):
        staged = receiver.receive(20.0)
        assert staged is not None
        receiver.acknowledge(staged, None)
        assert told(pipe) == ("sent", pool.layout.size_bytes)
        child.join(5)
        assert child.exitcode == -signal.SIGKILL
    assert receiver.receive(0.0) is None
    assert (tmp_path / ".partial-00000002" / "weights.safetensors").exists()
    staged = stage(tmp_path, pool)
    assert staged is not None and staged.policy_version == 1
    assert_same_bits(staged.weights, dict(make_parameters(num_floats=SMALL)))
    write(DiskSender(tmp_path), pool, 3)
    assert not list(tmp_path.glob(".partial-*"))
    staged = stage(tmp_path, pool)
    assert staged is not None and staged.policy_version == 3


def test_full_disk_rejects_the_version_and_the_next_one_succeeds(tmp_path: Path) -> None:
    pool = SnapshotPool(make_parameters(num_floats=SMALL))
    folder = tmp_path / "engine"
    sender = DiskSender(folder)
    folder.rmdir()  # Writing fails as on a full disk: an OSError from the operating system.
    with pytest.raises(TransferRejected, match="No such file") as caught:
        sender.send(pool.take(1), deadline=soon())
    assert caught.value.retryable
    folder.mkdir()
    write(sender, pool, 2)
    staged = stage(folder, pool)
    assert staged is not None and staged.policy_version == 2


def test_both_ends_close_at_once(tmp_path: Path) -> None:
    pool = SnapshotPool([("weight", torch.ones(4))])
    sender, receiver = DiskSender(tmp_path), DiskReceiver(tmp_path / "no", expected=pool.layout)
    sending = in_thread(lambda: sender.send(pool.take(1), deadline=soon(30)))
    receiving = in_thread(lambda: receiver.receive(30))
    started = time.monotonic()
    sender.close()
    receiver.close()
    assert isinstance(sending()[0], EngineLost) and isinstance(receiving()[0], LearnerLost)
    assert time.monotonic() - started < 0.7
    with pytest.raises(ValueError, match="keep"):
        DiskSender(tmp_path, keep=0)
