import asyncio
import contextlib
import os
import signal
from collections import deque

import pytest
import torch

from skyrl_async.weight_sync import sglang_loader
from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.receiver import WeightReceiver
from skyrl_async.weight_sync.receiving import receiving_end
from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from skyrl_async.weight_sync.sglang_loader import EngineBroken, SglangLoader, shared_payload
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.transport import LearnerLost, TransferRejected
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

MEMORY_CALLS = ["pause", "begin", "update", "end", "resume"]
FILE_CALLS = ["pause", "update", "resume"]
WAYS = pytest.mark.parametrize("way", ["memory", "file"])
KV = pytest.mark.parametrize("kv", ["recompute", "keep"])


def parameters_of(seed):
    return make_parameters(seed, num_floats=1_000)


def staged(parameters):
    buffer = FlatBuffer(WeightLayout.of(parameters), shared=True)
    for name, tensor in parameters:
        buffer.tensors[name].copy_(tensor)
    return buffer.tensors


@contextlib.asynccontextmanager
async def serving():
    """A fake server with the weights of seed 0, and its control."""
    async with FakeControl(parameters_of(0)) as server:
        control = SglangControl(url=server.url, admin_key=ADMIN_KEY)
        try:
            yield server, control
        finally:
            await control.close()
            assert server.unauthorized == 0


@WAYS
@KV
def test_a_load_pauses_updates_and_goes_on(way, kv, tmp_path):
    async def scenario():
        new = parameters_of(1)
        async with serving() as (server, control):
            loader = SglangLoader(control, kv_after_swap=kv, way=way, scratch=tmp_path)
            for version in (3, 4):
                report = await loader.load(staged(new), policy_version=version, timeout_s=5)
                assert report.policy_version == version and report.stall_s > 0
            assert server.calls == 2 * (MEMORY_CALLS if way == "memory" else FILE_CALLS)
            assert server.label == "4" and server.paused is None and not server.dead
            # Running requests keep their KV, and a flush under them would end the server.
            assert server.flushes == (2 if kv == "recompute" else 0)
            assert_same_bits(server.weights, dict(new))
            assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("kv", "mode"), [("recompute", "retract"), ("keep", "in_place")], ids=["recompute", "keep"]
)
def test_requests_lose_their_kv_only_if_it_is_recomputed(kv, mode):
    async def scenario():
        async with serving() as (server, control):
            loader = SglangLoader(control, kv_after_swap=kv, way="memory")
            async with loader.stopped(soon()):
                assert server.paused == mode

    asyncio.run(scenario())


def test_the_fake_dies_of_a_flush_under_requests_that_keep_their_kv():
    async def scenario():
        payload = shared_payload(staged(parameters_of(1)))
        async with serving() as (server, control):
            await control.pause("in_place", timeout_s=5)
            await control.begin(timeout_s=5)
            with pytest.raises(ControlError):
                await control.update_from_tensors(
                    [payload], policy_version=1, flush_cache=True, timeout_s=5
                )
            assert server.dead

    asyncio.run(scenario())


@WAYS
@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_a_failure_half_way_breaks_the_engine_and_it_goes_on(way, fault, tmp_path, monkeypatch):
    if fault == "hang":  # Nothing that follows is answered either.
        monkeypatch.setattr(sglang_loader, "_LEAST_S", 0.2)

    async def scenario(at):
        async with serving() as (server, control):
            server.faults[at] = deque([fault])
            loader = SglangLoader(control, kv_after_swap="recompute", way=way, scratch=tmp_path)
            with pytest.raises(EngineBroken, match=r"half way|does not go on"):
                await loader.load(staged(parameters_of(1)), policy_version=1, timeout_s=0.3)
            assert list(tmp_path.iterdir()) == []
            assert server.calls[-1] == "resume"
            if fault == "hang":  # It answers to nothing any more, and must start anew.
                return
            assert server.paused is None
            assert server.resumed_in_update == (at == "end")
            report = await loader.load(staged(parameters_of(2)), policy_version=2, timeout_s=5)
            assert report.policy_version == 2 and server.label == "2"
            assert_same_bits(server.weights, dict(parameters_of(2)))

    for at in ("begin", "update", "end") if way == "memory" else ("update",):
        asyncio.run(scenario(at))


def test_a_refused_pause_changes_nothing():
    async def scenario():
        async with serving() as (server, control):
            server.faults["pause"] = deque(["refuse"])
            loader = SglangLoader(control, kv_after_swap="keep", way="memory")
            with pytest.raises(ControlError, match="pause_generation"):
                await loader.load(staged(parameters_of(1)), policy_version=1, timeout_s=5)
            assert server.calls == ["pause"] and server.label == "unverified"

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["timeout", "cancel"])
def test_a_pause_that_may_have_happened_is_taken_back(end):
    async def scenario():
        async with serving() as (server, control):
            server.faults["pause"] = deque(["late"])
            loader = SglangLoader(control, kv_after_swap="keep", way="memory")
            loading = asyncio.create_task(
                loader.load(
                    staged(parameters_of(1)),
                    policy_version=1,
                    timeout_s=0.2 if end == "timeout" else 20,
                )
            )
            await server.hung.wait()
            if end == "cancel":
                loading.cancel()
            await asyncio.wait([loading, asyncio.create_task(server.called("resume"))])
            with pytest.raises(ControlError if end == "timeout" else asyncio.CancelledError):
                await loading
            assert server.calls == ["pause", "resume"] and server.paused is None

    asyncio.run(scenario())


def test_a_server_that_does_not_go_on_is_broken():
    async def scenario():
        async with serving() as (server, control):
            server.faults["resume"] = deque(["refuse"])
            loader = SglangLoader(control, kv_after_swap="keep", way="memory")
            with pytest.raises(EngineBroken, match="does not go on"):
                await loader.load(staged(parameters_of(1)), policy_version=1, timeout_s=5)

    asyncio.run(scenario())


def test_a_cancelled_load_leaves_the_server_going():
    async def scenario():
        async with serving() as (server, control):
            server.faults["update"] = deque(["late"])
            loader = SglangLoader(control, kv_after_swap="recompute", way="memory")
            loading = asyncio.create_task(
                loader.load(staged(parameters_of(1)), policy_version=1, timeout_s=20)
            )
            await server.hung.wait()
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert server.calls == [*MEMORY_CALLS[:3], "end", "resume"]
            assert server.paused is None and not server.updating

    asyncio.run(scenario())


def test_every_rank_gets_the_tensors():
    async def scenario():
        async with serving() as (server, control):
            loader = SglangLoader(
                control, kv_after_swap="recompute", way="memory", tensor_parallel=2
            )
            await loader.load(staged(parameters_of(1)), policy_version=1, timeout_s=5)
            assert server.num_payloads == 2

    asyncio.run(scenario())


def test_memory_of_this_process_alone_is_refused_before_the_pause():
    async def scenario():
        async with serving() as (server, control):
            loader = SglangLoader(control, kv_after_swap="recompute", way="memory")
            with pytest.raises(ValueError, match=r"embed\.weight.*shared memory"):
                await loader.load(dict(parameters_of(1)), policy_version=1, timeout_s=5)
            assert server.calls == []

    asyncio.run(scenario())


def test_a_wrong_key_is_refused_without_being_named():
    async def scenario():
        async with FakeControl(parameters_of(0)) as server:
            control = SglangControl(url=server.url, admin_key="0ther-key")
            with pytest.raises(ControlError, match="401") as caught:
                await control.pause("retract", timeout_s=5)
            await control.close()
            assert caught.value.status == 401 and "0ther-key" not in str(caught.value)
            assert server.unauthorized == 1 and server.paused is None

    asyncio.run(scenario())


def misfits():
    named = dict(parameters_of(0))
    shape = {**named, "norm.weight": torch.zeros(8)}
    unknown = {("other" if k == "scale" else k): v for k, v in named.items()}
    return [pytest.param(shape, id="shape"), pytest.param(unknown, id="name")]


@pytest.mark.parametrize("offered", misfits())
def test_weights_that_do_not_fit_are_refused_before_the_pause(store, offered):
    """The real server ignores unknown names without a word."""

    async def scenario():
        async with serving() as (server, control):
            loop = asyncio.get_running_loop()
            loader = SglangLoader(control, kv_after_swap="recompute", way="memory")

            def load(weights, policy_version):
                loading = loader.load(weights, policy_version=policy_version, timeout_s=5)
                asyncio.run_coroutine_threadsafe(loading, loop).result(10)

            def send(parameters):
                pool = SnapshotPool(parameters, num_buffers=1)
                sender = CollectiveSender("engine", store=store)
                receiver = WeightReceiver(
                    receiving_end(sender.address, expected=layout, policy_version=-1, shared=True),
                    load,
                )
                try:
                    return sender.send(pool.take(1), deadline=soon())
                finally:
                    sender.close()
                    receiver.close()

            layout = WeightLayout.of(parameters_of(0))
            with pytest.raises(TransferRejected, match="differ from the engine's"):
                await asyncio.to_thread(send, list(offered.items()))
            assert server.calls == []
            await asyncio.to_thread(send, parameters_of(1))
            assert server.calls == MEMORY_CALLS
            assert_same_bits(server.weights, dict(parameters_of(1)))

    asyncio.run(scenario())


def send_slowly(pipe, rate):
    """Publish one version so slowly that it does not arrive before this process is killed."""
    policy = Policy()
    pool = SnapshotPool(policy.model.named_parameters(), num_buffers=1)
    sender = CollectiveSender(
        "engine", store=host_store(), bucket_bytes=1 << 14, max_bytes_per_s=rate
    )
    pipe.send(sender.address)
    sender.send(pool.take(1), deadline=soon(60))


@pytest.mark.sglang
@pytest.mark.parametrize("kv", ["recompute", "keep"])
@pytest.mark.parametrize("way", ["memory", "file"])
def test_every_token_of_a_real_server_has_the_logprob_of_its_version(
    way, kv, sglang_server, tiny_model_folder, record_property
):
    spans_updates(sglang_server, tiny_model_folder, way, kv, record_property)


@pytest.mark.sglang
def test_a_lost_learner_leaves_a_real_server_on_its_version(sglang_server, tiny_model_folder):
    async def scenario():
        policy = Policy()
        layout = WeightLayout.of(policy.model.named_parameters())
        with process(send_slowly, 10_000) as (learner, pipe):
            receiver = CollectiveReceiver(told(pipe), expected=layout, shared=True)
            receiving = in_thread(lambda: receiver.receive(10.0))
            async with asyncio.timeout(20):
                while receiver._pair.group is None:
                    await asyncio.sleep(0.01)
            os.kill(learner.pid, signal.SIGKILL)
            outcome, _ = await asyncio.to_thread(receiving)
        assert outcome is None or isinstance(outcome, LearnerLost)
        receiver.close()
        reply = await Reply(sglang_server, max_tokens=30).run()
        assert set(reply.versions) == {"unverified"}
        assert policy.deviations(reply).max() < TOLERANCE
        async with updating(sglang_server, policy, way="memory", kv="recompute") as update:
            await update(1)
        reply = await Reply(sglang_server, max_tokens=30).run()
        assert set(reply.versions) == {"1"}
        assert policy.deviations(reply).max() < TOLERANCE

    with restored(sglang_server, tiny_model_folder):
        asyncio.run(scenario())
