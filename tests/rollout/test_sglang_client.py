import asyncio
import contextlib

import pytest

from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_errors import (
    AbortedByServer,
    AccessRefused,
    ConnectionLost,
    EngineHangs,
    EngineUnavailable,
    InvalidRequest,
    NonfiniteLogprob,
    UnsupportedServer,
    UnverifiedWeights,
)
from skyrl_async.rollout.sglang_client import ClientLimits, SglangClient
from skyrl_async.rollout.sglang_protocol import new_rid
from skyrl_async.types import FinishReason, Sampling
from tests.rollout.fake_sglang import VOCAB_SIZE, FakeSglang, Fault, continuation, logprob_of

CONTEXT = [5, 6, 7]
LIMITS = {"stall_timeout_s": 0.2, "control_timeout_s": 0.2, "abort_timeout_s": 5.0}


@contextlib.asynccontextmanager
async def client_of(server, *, policy_version=3, **limits):
    client = SglangClient(
        server.endpoint(policy_version=policy_version),
        vocab_size=VOCAB_SIZE,
        limits=ClientLimits(**{**LIMITS, "stream_interval": 4, **limits}),
    )
    try:
        yield client
    finally:
        await client.close()


def sampling(max_tokens=30, **options):
    return Sampling(max_tokens=max_tokens, **options)


async def generate(client, *, max_tokens=30, **options):
    return await client.generate(CONTEXT, sampling(max_tokens), rid=new_rid(), **options)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_reply_has_the_tokens_logprobs_and_versions_of_the_server(incremental):
    async def scenario():
        async with FakeSglang(incremental=incremental) as server, client_of(server) as client:
            await client.server_info()
            server.script.append([Fault(10, "swap", "4")])
            return await generate(client, extra_key="3"), server.bodies

    reply, bodies = asyncio.run(scenario())
    expected = continuation(CONTEXT, 30)
    assert reply.token_ids == expected
    assert reply.logprobs == [logprob_of(token_id) for token_id in expected]
    assert reply.policy_versions == [3] * 10 + [4] * 20
    assert reply.finish_reason is FinishReason.LENGTH
    assert [body["extra_key"] for body in bodies] == ["3"]


def test_a_stop_token_ends_a_reply():
    expected = continuation(CONTEXT, 30)

    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            request = sampling(stop_token_ids=(expected[11],))
            return await client.generate(CONTEXT, request, rid=new_rid())

    reply = asyncio.run(scenario())
    assert reply.token_ids == expected[:12]
    assert reply.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("kind", ["die", "cut"])
def test_a_lost_connection_leaves_the_tokens_that_had_come(incremental, kind):
    async def scenario():
        async with FakeSglang(incremental=incremental) as server, client_of(server) as client:
            await client.server_info()
            server.script.append([Fault(11, kind)])
            with pytest.raises(ConnectionLost) as caught:
                await generate(client)
            return caught.value

    error = asyncio.run(scenario())
    assert error.retryable
    assert error.partial is not None
    assert error.partial.token_ids == continuation(CONTEXT, 9)
    assert error.partial.policy_versions == [3] * 9


def test_a_lost_connection_leaves_no_token_of_an_uncertain_version():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.script.append([Fault(6, "swap", "4"), Fault(15, "cut")])
            with pytest.raises(ConnectionLost) as caught:
                await generate(client)
            server.script.append([Fault(15, "cut")])
            with pytest.raises(ConnectionLost) as later:
                await generate(client)
            return caught.value.partial, later.value.partial, client.known_version

    partial, later, known_version = asyncio.run(scenario())
    assert partial.token_ids == continuation(CONTEXT, 5)
    assert partial.policy_versions == [3] * 5
    assert known_version == 4
    assert later.policy_versions == [4] * 13


def test_a_refused_connection_is_lost():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            await server.die()
            with pytest.raises(ConnectionLost) as caught:
                await generate(client)
            with pytest.raises(ConnectionLost):
                await client.loads()
            return caught.value.partial

    assert asyncio.run(scenario()).token_ids == []


def test_an_abort_returns_the_tokens_that_the_server_had():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.script.append([Fault(12, "stall")])
            rid = new_rid()
            task = asyncio.create_task(client.generate(CONTEXT, sampling(), rid=rid))
            await server.stalled.wait()
            aborting = asyncio.create_task(client.abort(rid))
            while not server.aborts:
                await asyncio.sleep(0)
            server.go_on.set()
            await aborting
            await client.abort("of nobody")
            return await task, server.aborts == [rid]

    reply, aborted_once = asyncio.run(scenario())
    assert reply.token_ids == continuation(CONTEXT, 12)
    assert reply.finish_reason is FinishReason.ABORT
    assert aborted_once


def test_a_server_that_does_not_allow_aborts_is_left_with_what_it_had_sent():
    async def scenario():
        async with (
            FakeSglang(may_abort=False, api_key="secret") as server,
            client_of(server) as client,
        ):
            server.script.append([Fault(12, "stall")])
            rid = new_rid()
            task = asyncio.create_task(client.generate(CONTEXT, sampling(), rid=rid))
            await server.stalled.wait()
            await asyncio.sleep(0.02)
            await client.abort(rid)
            reply = await task
            server.go_on.set()
            while server.num_live:
                await asyncio.sleep(0.001)
            return reply

    reply = asyncio.run(scenario())
    assert reply.token_ids == continuation(CONTEXT, 9)
    assert reply.finish_reason is FinishReason.ABORT


def test_a_cancelled_request_is_aborted_on_the_server():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.script.append([Fault(12, "stall")])
            task = asyncio.create_task(generate(client))
            await server.stalled.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not server.aborts:
                await asyncio.sleep(0)
            return server.aborts == [server.bodies[0]["rid"]]

    assert asyncio.run(scenario())


def test_a_silent_server_that_answers_nothing_hangs():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.script.append([Fault(12, "stall")])
            task = asyncio.create_task(generate(client))
            await server.stalled.wait()
            server.answering.clear()
            with pytest.raises(EngineHangs, match="answer") as caught:
                await task
            return caught.value

    error = asyncio.run(scenario())
    assert error.retryable
    assert error.partial.token_ids == continuation(CONTEXT, 9)


def test_a_silent_server_that_loads_weights_is_waited_for():
    asked = []

    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            get, client._get = client._get, None

            async def counted(path, **options):
                asked.append(path)
                if len(asked) == 2:
                    server.go_on.set()
                return await get(path, **options)

            client._get = counted
            server.script.append([Fault(12, "stall")])
            return await generate(client)

    reply = asyncio.run(scenario())
    assert reply.token_ids == continuation(CONTEXT, 30)
    assert asked[:2] == ["model_info"] * 2


def test_patience_ends_at_the_request_timeout():
    async def scenario():
        async with FakeSglang() as server, client_of(server, request_timeout_s=0.3) as client:
            server.script.append([Fault(12, "stall")])
            with pytest.raises(EngineHangs, match="request_timeout_s") as caught:
                await generate(client)
            return caught.value.partial

    assert asyncio.run(scenario()).token_ids == continuation(CONTEXT, 9)


@pytest.mark.parametrize(
    ("fault", "kind", "kept"),
    [
        (Fault(12, "abort"), AbortedByServer, 12),
        (Fault(12, "error", 503), EngineUnavailable, 12),
        (Fault(12, "error", 400), InvalidRequest, 12),
        (Fault(12, "nan"), NonfiniteLogprob, 9),
        (Fault(12, "swap", "unverified"), UnverifiedWeights, 9),
    ],
)
def test_what_ends_a_reply_early_has_its_own_error_and_keeps_what_is_good(fault, kind, kept):
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.script.append([fault])
            with pytest.raises(kind) as caught:
                await generate(client)
            return caught.value.partial

    partial = asyncio.run(scenario())
    assert partial.token_ids == continuation(CONTEXT, kept)
    assert partial.policy_versions == [3] * kept


def test_a_server_with_unverified_weights_gives_no_token():
    async def scenario():
        async with FakeSglang(version="unverified") as server, client_of(server) as client:
            with pytest.raises(UnverifiedWeights):
                await client.reported_version()
            with pytest.raises(UnverifiedWeights, match="unverified") as caught:
                await generate(client)
            return caught.value.partial

    assert asyncio.run(scenario()).token_ids == []


def test_bad_requests_are_told_apart_from_bad_times():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            with pytest.raises(InvalidRequest, match="limit"):
                await generate(client, max_tokens=1000)
            with pytest.raises(InvalidRequest, match="tokenizer"):
                await client.generate([1000], sampling(), rid=new_rid())
            server.status = 503
            with pytest.raises(EngineUnavailable):
                await generate(client)
            return len(server.bodies)

    assert asyncio.run(scenario()) == 2


def test_the_key_is_sent_and_never_shown():
    async def scenario():
        async with FakeSglang(api_key="secret") as server:
            async with client_of(server) as client:
                assert (await generate(client)).token_ids == continuation(CONTEXT, 30)
                assert (await client.loads()).running == 0
            endpoint = EngineEndpoint(
                engine_id="e0", url=server.endpoint().url, api_key="wrong secret", policy_version=3
            )
            client = SglangClient(endpoint, vocab_size=VOCAB_SIZE)
            with pytest.raises(AccessRefused) as caught:
                await generate(client)
            await client.close()
            assert "wrong secret" not in f"{caught.value!r} {client!r} {endpoint!r}"

    asyncio.run(scenario())


def test_a_server_that_is_too_old_is_refused():
    async def scenario():
        async with FakeSglang(server_version="0.5.20") as server, client_of(server) as client:
            with pytest.raises(UnsupportedServer, match=r"0\.5\.20"):
                await client.server_info()

    asyncio.run(scenario())


def test_load_is_read_while_the_scheduler_is_blocked():
    async def scenario():
        async with FakeSglang() as server, client_of(server) as client:
            server.running.clear()
            server.kv_usage, server.foreign = 0.5, 2
            load = await client.loads()
            with pytest.raises(EngineHangs, match="server_info"):
                await client.server_info()
            return load, await client.reported_version()

    load, version = asyncio.run(scenario())
    assert (load.running, load.waiting, load.kv_usage) == (0, 2, 0.5)
    assert version == 3


def test_a_server_that_repeats_tokens_is_asked_for_fewer_chunks_of_long_replies():
    async def scenario(incremental):
        async with FakeSglang(incremental=incremental) as server, client_of(server) as client:
            await client.server_info()
            await generate(client, max_tokens=30)
            await generate(client, max_tokens=160)
            return [body["sampling_params"]["stream_interval"] for body in server.bodies]

    assert asyncio.run(scenario(True)) == [4, 4]
    assert asyncio.run(scenario(False)) == [4, 10]


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="stall_timeout_s"):
        ClientLimits(stall_timeout_s=0)
