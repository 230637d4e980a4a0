import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.weight_sync import sglang_direct, sglang_loader
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from skyrl_async.weight_sync.sglang_direct import DirectReceiver, DirectSender, plan_buckets
from skyrl_async.weight_sync.sglang_loader import EngineBroken, SglangLoader
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.transport import EngineLost, TransferRejected
from tests.weight_sync.fake_control import FakeControl
from tests.weight_sync.fake_server import ADMIN_KEY
from tests.weight_sync.other_process import process, told
from tests.weight_sync.peers import assert_same_bits, in_thread, make_parameters, soon
from tests.weight_sync.real_server import (
    TOLERANCE,
    Policy,
    Reply,
    restored,
    spans_updates,
    updating,
)

pytest_plugins = ("tests.sglang_server",)

NUM_FLOATS = 1_000
BUCKET_BYTES = 2_000
NUM_BUCKETS = 2
"""The first tensor is larger than a bucket; the others share one."""


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    bucket_bytes=st.integers(1, 2_000),
)
def test_buckets_have_every_tensor_once_and_in_order(counts, bucket_bytes):
    tensors = [(f"t{i}", torch.empty(count)) for i, count in enumerate(counts)]
    layout = WeightLayout.of(tensors)
    buckets = list(plan_buckets(layout, bucket_bytes))
    indices = [index for first, end in buckets for index in range(first, end)]
    assert indices == list(range(len(tensors)))
    places = (*layout.offsets, layout.size_bytes)
    for first, end in buckets:
        assert first < end
        assert places[end] - places[first] <= bucket_bytes or end == first + 1
    for (first, end), (_, next_end) in itertools.pairwise(buckets):
        assert next_end > end
        # No bucket could have taken the tensor after it.
        assert places[end + 1] - places[first] > bucket_bytes


class Ends:
    """Both ends of a direct pair, and the fake server that it leads to."""

    def __init__(self, server, store, *, bucket_bytes=BUCKET_BYTES, kv="recompute", rate=None):
        self.server = server
        self.parameters = make_parameters(1, num_floats=NUM_FLOATS)
        self.pool = SnapshotPool(self.parameters, num_buffers=1)
        self.sender = DirectSender(
            "engine", store=store, bucket_bytes=bucket_bytes, max_bytes_per_s=rate
        )
        self.receiver = DirectReceiver(self.sender.address, expected=self.pool.layout)
        self.control = SglangControl(url=server.url, admin_key=ADMIN_KEY)
        self.loader = SglangLoader(self.control, kv_after_swap=kv, way="memory")

    def send(self, version, *, timeout_s=5.0):
        """Start sending; the result waits for the outcome."""
        snapshot = self.pool.take(version)

        def send():
            try:
                return self.sender.send(snapshot, deadline=soon(timeout_s))
            finally:
                snapshot.release()

        return in_thread(send)

    async def publish(self, version, *, timeout_s=5.0):
        """Do what a worker does; return its report and the sender's outcome."""
        sent = self.send(version, timeout_s=timeout_s)
        staged = await asyncio.to_thread(self.receiver.receive, 5.0)
        try:
            report = await self.receiver.pull(self.control, self.loader)
        except (EngineBroken, ControlError) as error:
            self.receiver.acknowledge(staged, repr(error))
            report = error
        else:
            self.receiver.acknowledge(staged, None)
        outcome, _ = await asyncio.to_thread(sent)
        return report, outcome


@contextlib.asynccontextmanager
async def both_ends(store, **options):
    async with FakeControl(make_parameters(0, num_floats=NUM_FLOATS)) as server:
        ends = Ends(server, store, **options)
        try:
            yield ends
        finally:
            ends.sender.close()
            ends.receiver.close()
            await ends.control.close()
            assert server.unauthorized == 0


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_a_version_is_broadcast_into_the_paused_server(store, kv):
    async def scenario():
        async with both_ends(store, kv=kv) as ends:
            for version in (1, 2):
                report, outcome = await ends.publish(version)
                assert report.policy_version == version and report.stall_s > 0
                assert outcome.size_bytes == ends.pool.layout.size_bytes
                assert_same_bits(ends.server.weights, dict(ends.parameters))
                for _, tensor in ends.parameters:
                    tensor.add_(1)
            updates = NUM_BUCKETS * ["update"]
            first = ["pause", "join", "begin", *updates, "end", "resume"]
            assert ends.server.calls == [*first, "pause", "begin", *updates, "end", "resume"]
            assert ends.server.label == "2" and ends.server.paused is None
            # Once per version, and never under requests that keep their KV.
            assert ends.server.flushes == (2 if kv == "recompute" else 0)

    asyncio.run(scenario())


def test_only_the_last_bucket_names_the_version(store):
    async def scenario():
        async with both_ends(store) as ends:
            labels = []
            load = ends.server._load
            ends.server._load = lambda tensors, body: (
                labels.append((body.get("weight_version"), body["flush_cache"]))
                or load(tensors, body)
            )
            await ends.publish(1)
            assert labels == [*(NUM_BUCKETS - 1) * [(None, False)], ("1", True)]

    asyncio.run(scenario())


def misfits():
    named = dict(make_parameters(1, num_floats=NUM_FLOATS))
    shape = {**named, "norm.weight": torch.zeros(8)}
    unknown = {("other" if k == "scale" else k): v for k, v in named.items()}
    return [pytest.param(shape, id="shape"), pytest.param(unknown, id="name")]


@pytest.mark.parametrize("offered", misfits())
def test_weights_that_do_not_fit_are_refused_before_the_pause(store, offered):
    async def scenario():
        async with both_ends(store) as ends:
            fitting, ends.pool = ends.pool, SnapshotPool(list(offered.items()), num_buffers=1)
            sent = ends.send(1)
            assert await asyncio.to_thread(ends.receiver.receive, 5.0) is None
            outcome, _ = await asyncio.to_thread(sent)
            assert isinstance(outcome, TransferRejected) and not outcome.retryable
            assert "differ from the engine's" in str(outcome)
            assert ends.server.calls == []
            ends.pool = fitting
            await ends.publish(1)
            assert ends.server.label == "1"

    asyncio.run(scenario())


def test_a_version_that_the_engine_has_is_refused(store):
    async def scenario():
        async with both_ends(store) as ends:
            await ends.publish(4)
            sent = ends.send(4)
            assert await asyncio.to_thread(ends.receiver.receive, 5.0) is None
            outcome, _ = await asyncio.to_thread(sent)
            assert isinstance(outcome, TransferRejected)
            assert "not above 4" in str(outcome)

    asyncio.run(scenario())


@pytest.mark.parametrize("at", ["join", "begin", "update", "end", "resume"])
def test_a_refusal_half_way_breaks_the_engine_and_it_goes_on(store, at):
    async def scenario():
        async with both_ends(store) as ends:
            await ends.publish(1)
            if at == "join":
                ends.receiver.close()
                ends.sender.close()
                ends = Ends(ends.server, store)
            # An opening of an update is tried again, after closing one left open.
            ends.server.faults[at] = deque(2 * ["refuse"])
            ends.server.faults["update"] = deque(["none", "refuse"]) if at == "update" else deque()
            started = time.monotonic()
            report, outcome = await ends.publish(2, timeout_s=2 if at in ("join", "begin") else 9)
            assert time.monotonic() - started < 8
            assert isinstance(report, EngineBroken)
            # There is no old version that it could have kept.
            assert isinstance(outcome, EngineLost)
            assert ends.server.calls[-1] == "resume"
            if at != "resume":
                assert ends.server.paused is None and "half way" in str(report)
            assert ends.server.resumed_in_update == (at == "end")

    asyncio.run(scenario())


def test_a_refused_pause_changes_nothing(store):
    async def scenario():
        async with both_ends(store) as ends:
            ends.server.faults["pause"] = deque(["refuse"])
            report, outcome = await ends.publish(1)
            assert isinstance(report, ControlError)
            assert isinstance(outcome, TransferRejected)
            assert ends.server.calls == ["pause"]
            report, outcome = await ends.publish(2)
            assert report.policy_version == 2 and ends.server.label == "2"

    asyncio.run(scenario())


@pytest.fixture
def unanswered_soon(monkeypatch):
    """Give up early what a server that hangs will not answer."""
    monkeypatch.setattr(sglang_loader, "_LEAST_S", 0.2)
    monkeypatch.setattr(sglang_direct, "_LEAVE_TIMEOUT_S", 0.2)


def test_closing_the_sender_ends_a_transfer_at_once(store, unanswered_soon):
    async def scenario():
        async with both_ends(store) as ends:
            ends.server.faults["update"] = deque(["hang"])
            sent = ends.send(1, timeout_s=2)
            assert await asyncio.to_thread(ends.receiver.receive, 5.0) is not None
            pulling = asyncio.create_task(ends.receiver.pull(ends.control, ends.loader))
            await ends.server.hung.wait()
            started = time.monotonic()
            ends.sender.close()
            outcome, ended = await asyncio.to_thread(sent)
            assert isinstance(outcome, EngineLost) and ended - started < 1
            with pytest.raises(EngineBroken, match="does not go on"):
                await pulling

    asyncio.run(scenario())


def test_a_learner_that_falls_silent_breaks_the_engine_at_the_deadline(store, unanswered_soon):
    """The server waits in the broadcast and answers to nothing until it ends."""

    async def scenario():
        async with both_ends(store) as ends:
            started = time.monotonic()
            ends.server.faults["update"] = deque(["hang"])
            report, outcome = await ends.publish(1, timeout_s=0.5)
            assert isinstance(report, EngineBroken) and "does not go on" in str(report)
            assert isinstance(outcome, EngineLost)
            assert time.monotonic() - started < 8

    asyncio.run(scenario())


def send_slowly(pipe, rate):
    """Publish one version so slowly that it does not arrive before this process is killed."""
    policy = Policy()
    pool = SnapshotPool(policy.model.named_parameters(), num_buffers=1)
    sender = DirectSender("engine", store=host_store(), bucket_bytes=1 << 14, max_bytes_per_s=rate)
    pipe.send(sender.address)
    sender.send(pool.take(1), deadline=soon(30))


@pytest.mark.sglang
@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_every_token_of_a_real_server_has_the_logprob_of_its_version(
    kv, sglang_server, tiny_model_folder, record_property
):
    spans_updates(sglang_server, tiny_model_folder, "direct", kv, record_property)


@pytest.mark.sglang
def test_a_lost_learner_breaks_a_real_server_at_once(sglang_server, tiny_model_folder, monkeypatch):
    async def scenario():
        policy = Policy()
        control = SglangControl(url=sglang_server.url, admin_key=sglang_server.admin_key)
        loader = SglangLoader(control, kv_after_swap="recompute", way="memory")
        receiving = asyncio.Event()
        update = control.update_from_group

        async def note(*args, **options):
            receiving.set()
            await update(*args, **options)

        monkeypatch.setattr(control, "update_from_group", note)
        with process(send_slowly, 10_000) as (learner, pipe):
            receiver = DirectReceiver(
                told(pipe), expected=WeightLayout.of(policy.model.named_parameters())
            )
            staged = await asyncio.to_thread(receiver.receive, 20.0)
            started = time.monotonic()
            pulling = asyncio.create_task(receiver.pull(control, loader))
            await receiving.wait()
            os.kill(learner.pid, signal.SIGKILL)
            with pytest.raises(EngineBroken, match=r"half way.*receive weights"):
                await pulling
        assert time.monotonic() - started < staged.deadline - started
        receiver.close()
        await control.close()
        # The server goes on, so that a worker may load whole weights into it again.
        for way in ("memory", "direct"):
            async with updating(sglang_server, policy, way=way, kv="recompute") as load:
                version = 1 + len(policy.by_label)
                await load(version)
            reply = await Reply(sglang_server, max_tokens=30).run()
            assert set(reply.versions) == {str(version)}
            assert policy.deviations(reply).max() < TOLERANCE

    with restored(sglang_server, tiny_model_folder):
        asyncio.run(scenario())
