import time

import pytest
import torch
import torch.distributed as dist

from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.control_channel import MAX_MESSAGE_BYTES, ControlChannel
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    encode_manifest,
)
from tests.weight_sync.peers import (
    HandDrivenEngine,
    HandDrivenLearner,
    assert_same_bits,
    in_thread,
    make_parameters,
    soon,
)


def test_transfer_that_stops_half_way_is_retryable_in_a_new_group(store: dist.TCPStore) -> None:
    snapshot = SnapshotPool(make_parameters()).take(1)
    learner = HandDrivenLearner(store)
    receiver = CollectiveReceiver(learner.address, expected=snapshot.layout)
    announcement = {
        "manifest": encode_manifest(snapshot.manifest()),
        "bucket_bytes": 1 << 16,
        "group_number": 1,
        "remaining_s": 5.0,
    }
    buckets = snapshot.flat.split(1 << 16)

    receiving = in_thread(lambda: receiver.receive(5.0))
    learner.accept()
    assert learner.ask(announcement)["error"] is None
    group = learner.join(1)
    group.broadcast(buckets[:2], deadline=soon())
    group.interrupt()
    answer = learner.channel.receive(deadline=soon())
    assert "incomplete" in answer["error"] and answer["retryable"]
    assert receiving()[0] is None

    receiving = in_thread(lambda: receiver.receive(5.0))
    assert learner.ask(announcement | {"group_number": 2})["error"] is None
    learner.join(2).broadcast(buckets, deadline=soon())
    staged, _ = receiving()
    assert staged.policy_version == 1
    assert_same_bits(staged.weights, dict(snapshot.tensors))
    receiver.close()
    learner.channel.close()


def test_truncated_last_bucket_is_never_loaded(store: dist.TCPStore) -> None:
    snapshot = SnapshotPool(make_parameters()).take(1)
    learner = HandDrivenLearner(store)
    receiver = CollectiveReceiver(learner.address, expected=snapshot.layout)
    receiving = in_thread(lambda: receiver.receive(5.0))
    learner.accept()
    announcement = {
        "manifest": encode_manifest(snapshot.manifest()),
        "bucket_bytes": 1 << 16,
        "group_number": 1,
        "remaining_s": 0.5,
    }
    assert learner.ask(announcement)["error"] is None
    buckets = list(snapshot.flat.split(1 << 16))
    buckets[-1] = buckets[-1][:-64].clone()
    group = learner.join(1)
    in_thread(lambda: group.broadcast(buckets, deadline=soon(0.5)))()
    answer = learner.channel.receive(deadline=soon())
    assert answer["error"] is not None and answer["retryable"]
    assert receiving()[0] is None
    receiver.close()
    learner.channel.close()


def test_malformed_announcements_are_answered_and_survived(store: dist.TCPStore) -> None:
    snapshot = SnapshotPool(make_parameters()).take(1)
    good = {
        "manifest": encode_manifest(snapshot.manifest()),
        "bucket_bytes": 1 << 16,
        "group_number": 1,
        "remaining_s": 5.0,
    }
    bad = [
        {},
        good | {"manifest": "{}"},
        good | {"manifest": None},
        good | {"bucket_bytes": 0},
        good | {"bucket_bytes": 1.5},
        good | {"group_number": True},
        good | {"remaining_s": float("nan")},
        good | {"remaining_s": -1},
        good | {"remaining_s": "5"},
    ]
    learner = HandDrivenLearner(store)
    receiver = CollectiveReceiver(learner.address, expected=snapshot.layout)

    def receive_all() -> list:
        return [receiver.receive(5.0) for _ in bad]

    receiving = in_thread(receive_all)
    learner.accept()
    for message in bad:
        answer = learner.ask(message)
        assert "malformed" in answer["error"] and not answer["retryable"], message
    assert receiving()[0] == [None] * len(bad)
    receiver.close()
    learner.channel.close()


def test_peer_that_sends_no_messages_ends_the_pair(store: dist.TCPStore) -> None:
    for garbage in (b"\xff" * 64, b"\0\0\0\2[]", b"\0\0\0\1{"):
        learner = HandDrivenLearner(store)
        receiver = CollectiveReceiver(
            learner.address, expected=WeightLayout.of(make_parameters()), policy_version=3
        )
        receiving = in_thread(lambda receiver=receiver: receiver.receive(5.0))
        learner.accept()
        learner.channel._connection.sendall(garbage)
        assert isinstance(receiving()[0], LearnerLost)
        learner.channel.close()
    assert MAX_MESSAGE_BYTES < 0xFFFFFFFF


def test_stranger_cannot_take_the_place_of_the_engine(store: dist.TCPStore) -> None:
    parameters = make_parameters()
    pool = SnapshotPool(parameters)
    sender = CollectiveSender("engine-0", store=store)
    stranger = HandDrivenEngine(sender.address, pair_id="guess")
    silent = ControlChannel.connect("127.0.0.1", sender.address.control_port, deadline=soon())
    with_engine = in_thread(lambda: sender.send(pool.take(1), deadline=soon()))
    with pytest.raises(OSError):
        stranger.channel.receive(deadline=soon())
    silent.close()
    engine = HandDrivenEngine(sender.address)
    assert "manifest" in engine.channel.receive(deadline=soon())
    sender.close()
    assert isinstance(with_engine()[0], EngineLost)
    engine.channel.close()


@pytest.mark.parametrize("state", ["connect", "answer", "broadcast", "acknowledgement"])
@pytest.mark.parametrize("end", ["deadline", "close"])
def test_sender_gives_up_a_silent_engine_in_time(
    store: dist.TCPStore, state: str, end: str
) -> None:
    # More than the buffers of a loopback connection, so that a broadcast really blocks.
    pool = SnapshotPool([("weight", torch.ones(8 << 20))])
    sender = CollectiveSender("engine-0", store=store, bucket_bytes=16 << 20)
    timeout_s = 0.5 if end == "deadline" else 30.0
    snapshot = pool.take(1)
    snapshot.manifest()
    deadline = soon(timeout_s)
    sending = in_thread(lambda: sender.send(snapshot, deadline=deadline))
    group = engine = None
    if state != "connect":
        engine = HandDrivenEngine(sender.address)
        announcement = engine.channel.receive(deadline=soon())
        if state != "answer":
            group = engine.join(announcement)
        if state == "acknowledgement":
            received = torch.empty_like(snapshot.flat)
            group.broadcast(received.split(16 << 20), deadline=soon())
            assert torch.equal(received, snapshot.flat)
    if end == "close":
        deadline = time.monotonic()
        sender.close()
    error, ended = sending()
    assert isinstance(error, EngineLost) and "'engine-0'" in str(error)
    assert -0.05 < ended - deadline < 0.7
    if engine is not None:
        engine.channel.close()


@pytest.mark.parametrize("state", ["idle", "broadcast"])
def test_receiver_closes_at_once_in_every_state(store: dist.TCPStore, state: str) -> None:
    snapshot = SnapshotPool(make_parameters()).take(1)
    learner = HandDrivenLearner(store)
    receiver = CollectiveReceiver(learner.address, expected=snapshot.layout)
    receiving = in_thread(lambda: receiver.receive(30.0))
    learner.accept()
    group = None
    if state == "broadcast":
        announcement = {
            "manifest": encode_manifest(snapshot.manifest()),
            "bucket_bytes": 1 << 16,
            "group_number": 1,
            "remaining_s": 30.0,
        }
        assert learner.ask(announcement)["error"] is None
        group = learner.join(1)
        group.broadcast(snapshot.flat.split(1 << 16)[:1], deadline=soon())
    started = time.monotonic()
    receiver.close()
    error, ended = receiving()
    assert isinstance(error, LearnerLost)
    assert ended - started < 0.7
    learner.channel.close()
