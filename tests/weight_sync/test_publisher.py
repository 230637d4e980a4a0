import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from skyrl_async.weight_sync.publisher import EngineEvent, EngineStatus, WeightPublisher
from skyrl_async.weight_sync.snapshot import SnapshotPool, WeightSnapshot
from skyrl_async.weight_sync.transport import EngineLost, TransferRejected, TransferReport
from tests.weight_sync.peers import Pair, assert_same_bits, in_thread, make_parameters


class ScriptedSender:
    """Keeps the contract of a sender; the test decides when and how every send ends."""

    def __init__(self, act: Callable[[int], None] = lambda version: None) -> None:
        self.act = act
        self.versions: list[int] = []
        self.closed = threading.Event()
        self.started = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.stepwise = False

    def send(self, snapshot: WeightSnapshot, *, deadline: float) -> TransferReport:
        assert not self.closed.is_set(), "a closed sender must not be used again"
        assert time.monotonic() < deadline
        checksum = snapshot.manifest().checksum
        self.started.release()
        while self.stepwise and not self.go_on.acquire(timeout=0.01):
            if self.closed.is_set() or time.monotonic() >= deadline:
                self.closed.set()
                raise EngineLost("closed or out of time")
        self.act(snapshot.policy_version)
        assert snapshot.manifest().checksum == checksum, "released while it was being sent"
        self.versions.append(snapshot.policy_version)
        return TransferReport(size_bytes=snapshot.layout.size_bytes, transfer_s=0.1, load_s=0.2)

    def close(self) -> None:
        self.closed.set()


def make_pool() -> SnapshotPool:
    return SnapshotPool(make_parameters(num_floats=100))


def test_newest_version_replaces_the_waiting_one() -> None:
    pool, sender = make_pool(), ScriptedSender()
    sender.stepwise = True
    publisher = WeightPublisher({"a": sender}, timeout_s=10)
    publisher.publish(pool.take(0))
    assert sender.started.acquire(timeout=5)
    for version in range(1, 50):
        publisher.publish(pool.take(version))  # Three buffers suffice, nothing waits.
    assert not publisher.wait_idle(0.0)
    sender.go_on.release(2)
    assert publisher.wait_idle(5)
    assert sender.versions == [0, 49]
    stats = publisher.take_stats()
    assert (stats.num_publishes, stats.versions_skipped) == (2, 48)
    assert stats.size_bytes == 2 * pool.layout.size_bytes
    assert publisher.engine_versions == {"a": 49}
    assert publisher.take_stats().num_publishes == publisher.take_stats().versions_skipped == 0
    publisher.close()
    assert sorted(pool.take(v).policy_version for v in (50, 51, 52)) == [50, 51, 52]


def test_slow_engine_delays_others_only_until_the_deadline() -> None:
    pool, quick, stuck = make_pool(), ScriptedSender(), ScriptedSender()
    stuck.stepwise = True
    events: list[EngineEvent] = []
    publisher = WeightPublisher(
        {"quick": quick, "stuck": stuck}, timeout_s=0.4, on_event=events.append
    )
    started = time.monotonic()
    publisher.publish(pool.take(1))
    assert stuck.started.acquire(timeout=5)
    publisher.publish(pool.take(2))
    assert publisher.wait_idle(5)
    assert 0.35 < time.monotonic() - started < 1.0
    assert quick.versions == [1, 2] and stuck.versions == []
    assert [(e.engine_id, e.policy_version, e.status) for e in events] == [
        ("quick", 1, EngineStatus.LOADED),
        ("stuck", 1, EngineStatus.LOST),
        ("quick", 2, EngineStatus.LOADED),
    ]
    assert publisher.take_stats().lost_engines == ("stuck",)
    assert publisher.engine_versions == {"quick": 2}
    publisher.close()


def test_sender_that_overruns_its_deadline_is_given_up() -> None:
    pool, release = make_pool(), threading.Event()
    overrunning = ScriptedSender(lambda version: release.wait(10) and None)
    publisher = WeightPublisher({"a": overrunning}, timeout_s=0.1)
    publisher.publish(pool.take(1))
    assert publisher.wait_idle(3)
    assert publisher.take_stats().lost_engines == ("a",)
    assert overrunning.closed.is_set()
    publisher.publish(pool.take(2))  # Without engines a version ends at once.
    assert publisher.wait_idle(3)
    release.set()
    publisher.close()


def test_retryable_rejection_gets_one_more_attempt_and_others_none() -> None:
    def reject(times: int, *, retryable: bool) -> Callable[[int], None]:
        left = [times]

        def act(version: int) -> None:
            if left[0]:
                left[0] -= 1
                raise TransferRejected("not now", retryable=retryable)

        return act

    pool = make_pool()
    senders = {
        "once": ScriptedSender(reject(1, retryable=True)),
        "twice": ScriptedSender(reject(2, retryable=True)),
        "final": ScriptedSender(reject(1, retryable=False)),
    }
    publisher = WeightPublisher(senders, timeout_s=5)
    publisher.publish(pool.take(1))
    assert publisher.wait_idle(5)
    assert publisher.engine_versions == {"once": 1, "twice": -1, "final": -1}
    assert publisher.take_stats().num_rejections == 2
    publisher.publish(pool.take(2))
    assert publisher.wait_idle(5)
    assert publisher.engine_versions == {"once": 2, "twice": 2, "final": 2}
    publisher.close()


def test_engine_that_comes_back_gets_the_same_version_alone() -> None:
    pool, first, back = make_pool(), ScriptedSender(), ScriptedSender()
    publisher = WeightPublisher({"a": first}, timeout_s=5)
    publisher.publish(pool.take(7))
    assert publisher.wait_idle(5)
    with pytest.raises(ValueError, match="'a' is served already"):
        publisher.add_engine("a", back)
    publisher.add_engine("b", back)
    publisher.publish(pool.take(7))
    assert publisher.wait_idle(5)
    assert first.versions == back.versions == [7]
    publisher.remove_engine("a")
    publisher.remove_engine("unknown")
    assert first.closed.is_set() and publisher.engine_versions == {"b": 7}
    publisher.close()


def test_removed_engine_does_not_count_as_lost() -> None:
    pool, leaving = make_pool(), ScriptedSender()
    leaving.stepwise = True
    publisher = WeightPublisher({"a": leaving}, timeout_s=10)
    publisher.publish(pool.take(1))
    assert leaving.started.acquire(timeout=5)
    publisher.remove_engine("a")
    assert publisher.wait_idle(5)
    assert publisher.take_stats().lost_engines == ()
    publisher.close()


@pytest.mark.parametrize("culprit", ["sender", "listener"])
def test_death_of_the_publisher_surfaces_on_the_next_call(culprit: str) -> None:
    def fail(argument: object) -> None:
        raise ZeroDivisionError("a bug")

    pool = make_pool()
    sender = ScriptedSender(fail) if culprit == "sender" else ScriptedSender()
    publisher = WeightPublisher(
        {"a": sender}, timeout_s=5, on_event=fail if culprit == "listener" else None
    )
    publisher.check()
    publisher.publish(pool.take(1))
    with pytest.raises(RuntimeError, match=r"publisher died: ZeroDivisionError\('a bug'\)"):
        publisher.wait_idle(5)
    for version in range(2, 12):  # The snapshots go back to the pool all the same.
        with pytest.raises(RuntimeError, match="publisher died"):
            publisher.publish(pool.take(version))
    publisher.close()


def test_versions_may_not_go_back_and_a_closed_publisher_takes_none() -> None:
    pool = make_pool()
    publisher = WeightPublisher({}, timeout_s=5)
    publisher.publish(pool.take(5))
    with pytest.raises(ValueError, match="4 cannot follow 5"):
        publisher.publish(pool.take(4))
    publisher.close()
    publisher.close()
    with pytest.raises(RuntimeError, match="closed"):
        publisher.publish(pool.take(6))
    with pytest.raises(ValueError, match="timeout_s"):
        WeightPublisher({}, timeout_s=0)


def test_close_in_the_middle_of_a_transfer_is_prompt(store: dist.TCPStore) -> None:
    parameters = make_parameters()
    with Pair(store, parameters) as pair:
        entered, leave = threading.Event(), threading.Event()

        def hold(policy_version: int) -> None:
            entered.set()
            leave.wait(10)

        pair.engine.before_load = hold
        events: list[EngineEvent] = []
        publisher = WeightPublisher({"a": pair.sender}, timeout_s=30, on_event=events.append)
        publisher.publish(pair.pool.take(1))
        assert entered.wait(5)
        publisher.publish(pair.pool.take(2))
        started = time.monotonic()
        publisher.close()
        assert time.monotonic() - started < 0.7
        assert events == []
        leave.set()
        # Both snapshots are back in the pool.
        assert [pair.pool.take(v).policy_version for v in (3, 4, 5)] == [3, 4, 5]


def test_training_goes_on_over_real_groups_and_every_swap_is_one_whole_version(
    store: dist.TCPStore,
) -> None:
    parameters = make_parameters()
    history = {}
    with Pair(store, parameters) as first, Pair(store, parameters) as second:
        pool = first.pool
        publisher = WeightPublisher({"a": first.sender, "b": second.sender}, timeout_s=10)
        seen: dict[str, list[int]] = {"a": [], "b": []}
        for version in range(60):
            for _, tensor in parameters:
                tensor.add_(1)
            history[version] = {name: tensor.clone() for name, tensor in parameters}
            publisher.publish(pool.take(version))
        assert publisher.wait_idle(10)
        for pair in (first, second):
            assert pair.engine.policy_version == 59
            assert_same_bits(pair.engine.live, history[59])
        seen["a"], seen["b"] = first.engine.loaded, second.engine.loaded
        assert seen["a"] == seen["b"] == sorted(set(seen["a"]))
        stats = publisher.take_stats()
        assert stats.num_publishes == len(seen["a"])
        assert stats.num_publishes + stats.versions_skipped == 60
        publisher.close()


def test_publish_returns_at_once_while_an_engine_hangs() -> None:
    pool, stuck = make_pool(), ScriptedSender()
    stuck.stepwise = True
    publisher = WeightPublisher({"a": stuck}, timeout_s=30)
    publisher.publish(pool.take(0))
    assert stuck.started.acquire(timeout=5)
    outcome, _ = in_thread(lambda: [publisher.publish(pool.take(v)) for v in range(1, 200)])()
    assert outcome == [None] * 199
    publisher.close()
