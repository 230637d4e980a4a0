import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    TransferRejected,
)
from tests.weight_sync.peers import (
    Pair,
    Parameters,
    assert_same_bits,
    make_parameters,
    soon,
)


def send(pair: Pair, policy_version: int) -> None:
    snapshot = pair.pool.take(policy_version)
    try:
        pair.sender.send(snapshot, deadline=soon())
    finally:
        snapshot.release()


def test_engine_runs_the_bits_of_each_snapshot(store: dist.TCPStore) -> None:
    parameters = make_parameters()
    with Pair(store, parameters) as pair:
        for version in (0, 1, 2, 7):
            expected = {}
            for name, tensor in parameters:
                tensor.add_(version + 1)
                expected[name] = tensor.clone()
            snapshot = pair.pool.take(version)
            for _, tensor in parameters:
                tensor.mul_(3)  # Training goes on while the version travels.
            report = pair.sender.send(snapshot, deadline=soon())
            snapshot.release()
            assert report.size_bytes == snapshot.layout.size_bytes
            assert_same_bits(pair.engine.live, expected)
        assert pair.engine.loaded == [0, 1, 2, 7]
        pair.receiver.check()


def test_live_weights_stay_untouched_while_later_versions_arrive(store: dist.TCPStore) -> None:
    parameters = make_parameters()
    with Pair(store, parameters) as pair:
        for version in range(6):
            before = pair.engine.live
            kept = {name: tensor.clone() for name, tensor in before.items()}
            seen_at_swap: list[bool] = []

            def compare(
                _: int, before: object = before, kept: dict = kept, seen: list = seen_at_swap
            ) -> None:
                assert_same_bits(before, kept)  # type: ignore[arg-type]
                seen.append(True)

            pair.engine.before_load = compare
            for _, tensor in parameters:
                tensor.add_(1)
            send(pair, version)
            assert seen_at_swap == [True]


def flip_a_bit(flat: torch.Tensor) -> None:
    flat[12_345] ^= 4


def swap_two_buckets(flat: torch.Tensor) -> None:
    first, second = flat[: 1 << 16].clone(), flat[1 << 16 : 2 << 16].clone()
    flat[: 1 << 16], flat[1 << 16 : 2 << 16] = second, first


@pytest.mark.parametrize("damage", [flip_a_bit, swap_two_buckets])
def test_damaged_bytes_leave_the_old_version_and_a_retry_succeeds(
    store: dist.TCPStore, damage: Callable[[torch.Tensor], None]
) -> None:
    with Pair(store, make_parameters()) as pair:
        send(pair, 1)
        old = {name: tensor.clone() for name, tensor in pair.engine.live.items()}
        snapshot = pair.pool.take(2)
        intact = snapshot.flat.clone()
        snapshot.manifest()
        damage(snapshot.flat)
        with pytest.raises(TransferRejected, match="damaged on its way") as caught:
            pair.sender.send(snapshot, deadline=soon())
        assert caught.value.retryable and pair.engine.loaded == [1]
        assert_same_bits(pair.engine.live, old)
        snapshot.flat.copy_(intact)
        pair.sender.send(snapshot, deadline=soon())
        assert pair.engine.loaded == [1, 2]
        pair.receiver.check()


def renamed(parameters: Parameters) -> Parameters:
    return [("other.weight", parameters[0][1]), *parameters[1:]]


def reshaped(parameters: Parameters) -> Parameters:
    return [(parameters[0][0], parameters[0][1].view(10, -1)), *parameters[1:]]


def retyped(parameters: Parameters) -> Parameters:
    return [(parameters[0][0], parameters[0][1].to(torch.float16)), *parameters[1:]]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda parameters: parameters[1:], "names differ"),
        (lambda parameters: parameters[:-1], "4 tensors instead of 5"),
        (renamed, "'other.weight' instead of 'embed.weight'"),
        (reshaped, "shapes differ"),
        (retyped, "dtypes differ"),
    ],
)
def test_other_layout_is_refused_before_any_byte(
    store: dist.TCPStore, change: Callable[[Parameters], Parameters], reason: str
) -> None:
    parameters = make_parameters()
    with Pair(store, parameters) as pair:
        other = SnapshotPool(change(parameters)).take(1)
        with pytest.raises(TransferRejected, match=reason) as caught:
            pair.sender.send(other, deadline=soon())
        assert not caught.value.retryable
        send(pair, 1)
        assert pair.engine.loaded == [1]


def test_old_and_duplicate_versions_are_refused_and_a_jump_is_not(store: dist.TCPStore) -> None:
    with Pair(store, make_parameters()) as pair:
        send(pair, 5)
        for version in (5, 4, 0):
            with pytest.raises(TransferRejected, match="is not above 5"):
                send(pair, version)
        send(pair, 1_000_000)
        assert pair.engine.loaded == [5, 1_000_000]


def test_failed_load_is_reported_and_may_be_tried_again(store: dist.TCPStore) -> None:
    with Pair(store, make_parameters()) as pair:
        send(pair, 1)

        def fail(policy_version: int) -> None:
            raise ValueError("no such parameter")

        pair.engine.before_load = fail
        with pytest.raises(TransferRejected, match="no such parameter") as caught:
            send(pair, 2)
        assert caught.value.retryable
        pair.engine.before_load = lambda policy_version: None
        send(pair, 2)
        assert pair.engine.loaded == [1, 2]


def test_load_that_times_out_ends_the_receiver(store: dist.TCPStore) -> None:
    with Pair(store, make_parameters()) as pair:

        def hang(policy_version: int) -> None:
            raise TimeoutError("the engine did not swap in 30 s")

        pair.engine.before_load = hang
        with pytest.raises(EngineLost, match="closed the connection"):
            send(pair, 1)
        assert str(pair.ends.get(timeout=5)) == "the engine did not swap in 30 s"
        with pytest.raises(RuntimeError, match="did not swap"):
            pair.receiver.check()


def test_idle_receiver_notices_at_once_that_its_sender_left(store: dist.TCPStore) -> None:
    with Pair(store, make_parameters()) as pair:
        send(pair, 1)
        started = time.monotonic()
        pair.sender.close()
        assert isinstance(pair.ends.get(timeout=5), LearnerLost)
        assert time.monotonic() - started < 0.7
        with pytest.raises(RuntimeError, match="weight receiver ended: the learner is lost"):
            pair.receiver.check()
        assert pair.engine.policy_version == 1


def test_only_loopback_is_listened_on() -> None:
    already = listeners_of_this_process()
    store = host_store()
    with Pair(store, make_parameters()) as pair:
        before_connection = listeners_of_this_process() - already
        assert pair.sender.address.control_port in {port for _, port in before_connection}
        send(pair, 1)
        listeners = listeners_of_this_process() - already
    assert store.port in {port for _, port in listeners}
    assert {address for address, _ in before_connection | listeners} == {"127.0.0.1"}


def listeners_of_this_process() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens, from /proc."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    address, port = fields[1].split(":")
                    octets = [str(byte) for byte in bytes.fromhex(address)[::-1]]
                    found.add((".".join(octets), int(port, 16)))
    return found


def test_native_threads_end_with_the_pair_and_nothing_is_printed(
    store: dist.TCPStore, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _native_threads()
    for _ in range(3):
        with Pair(store, make_parameters()) as pair:
            send(pair, 1)
            assert _native_threads() - before
        del pair
    deadline = soon()
    while _native_threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _native_threads() - before == set()
    assert capfd.readouterr() == ("", "")


def _native_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))
