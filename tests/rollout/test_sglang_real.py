import asyncio
import contextlib
import os
import signal

import aiohttp
import pytest

from skyrl_async.learner.tiny_policy import BUILT_IN_VOCABULARY_SIZE, STOP_TOKEN, VOCABULARY
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_errors import UnverifiedWeights
from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.rollout.engine_process import EngineProcess
from skyrl_async.rollout.sglang_client import ClientLimits, SglangClient
from skyrl_async.rollout.sglang_protocol import new_rid
from skyrl_async.types import FinishReason, Sampling

pytest_plugins = ("tests.sglang_server",)
pytestmark = pytest.mark.sglang

CONTEXT = [5, 6, 7, 8, 9]
TOLERANCE = 1e-4
VOCAB_SIZE = BUILT_IN_VOCABULARY_SIZE
"""Of the tiny policy: it can sample tokens that its tokenizer does not have."""


async def post_as_admin(server, path, body):
    """Do what only the worker beside a server may."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{server.url}/{path}", json=body) as response,
    ):
        assert response.status == 200, await response.text()


async def relabel(server, label):
    """Give the weights of a server a name, as its worker does after a verified load."""
    body = {"new_version": label, "abort_all_requests": False}
    await post_as_admin(server, "update_weight_version", body)


async def load_same_weights(server, folder, version):
    """Give a running server its own weights again, as another version."""
    await post_as_admin(server, "pause_generation", {"mode": "retract"})
    body = {"model_path": str(folder), "flush_cache": True, "weight_version": version}
    await post_as_admin(server, "update_weights_from_disk", body)
    await post_as_admin(server, "continue_generation", {"torch_empty_cache": False})


def endpoint_of(server, engine_id="e0", *, policy_version=7, api_key=""):
    return EngineEndpoint(
        engine_id=engine_id,
        url=server.url,
        api_key=api_key or server.api_key,
        policy_version=policy_version,
    )


@contextlib.asynccontextmanager
async def client_of(server, *, label="7", api_key=""):
    client = SglangClient(
        endpoint_of(server, api_key=api_key), vocab_size=VOCAB_SIZE, limits=ClientLimits()
    )
    await relabel(server, label)
    try:
        yield client
    finally:
        await client.close()
        await relabel(server, "unverified")


@contextlib.asynccontextmanager
async def pool_of(*endpoints):
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=1024, poll_interval_s=0.2)
    runner = asyncio.create_task(pool.run())
    pool.set_engines(endpoints)
    try:
        yield pool
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


async def idle(client):
    """Return when the server has nothing to do."""
    async with asyncio.timeout(20):
        while (load := await client.loads()).running + load.waiting:
            await asyncio.sleep(0.05)


def plain_logprobs(folder, context, token_ids, *, temperature=1.0):
    """Return the logits of every token, and logprobs of ``token_ids``, by a plain forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*context, *token_ids]])).logits[0, len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logits, logprobs.gather(-1, torch.tensor(token_ids).unsqueeze(-1)).squeeze(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(sglang_server, tiny_model_folder, temperature):
    async def scenario():
        async with client_of(sglang_server) as client:
            info = await client.server_info()
            sampling = Sampling(max_tokens=100, temperature=temperature)
            return info, await client.generate(CONTEXT, sampling, rid=new_rid())

    info, reply = asyncio.run(scenario())
    assert info.version == sglang_server.sglang_version
    assert len(reply.token_ids) == 100
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.policy_versions == [7] * 100
    assert reply.prompt_tokens == len(CONTEXT)
    _, expected = plain_logprobs(
        tiny_model_folder, CONTEXT, reply.token_ids, temperature=temperature
    )
    assert reply.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_greedy_takes_the_likeliest_tokens_with_logprobs_of_temperature_one(
    sglang_server, tiny_model_folder
):
    async def scenario():
        async with client_of(sglang_server) as client:
            greedy = client.generate(CONTEXT, Sampling(max_tokens=40, temperature=0), rid=new_rid())
            beside = client.generate(CONTEXT, Sampling(max_tokens=60, temperature=2), rid=new_rid())
            reply, _ = await asyncio.gather(greedy, beside)
            return reply

    reply = asyncio.run(scenario())
    logits, expected = plain_logprobs(tiny_model_folder, CONTEXT, reply.token_ids)
    assert reply.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert reply.token_ids == logits.argmax(-1).tolist()


def test_a_stop_token_ends_the_reply_and_is_part_of_it(sglang_server):
    async def scenario():
        async with client_of(sglang_server) as client:
            sampling = Sampling(max_tokens=900, stop_token_ids=tuple(range(10, 20)))
            return await client.generate(CONTEXT, sampling, rid=new_rid())

    reply = asyncio.run(scenario())
    assert reply.finish_reason is FinishReason.STOP
    # A server also stops where the model's own configuration says so.
    stops = {*range(10, 20), VOCABULARY.index(STOP_TOKEN)}
    assert reply.token_ids[-1] in stops
    assert stops.isdisjoint(reply.token_ids[:-1])


@pytest.mark.parametrize("allowed", [False, True])
def test_an_abort_keeps_what_was_sampled_and_frees_the_server(
    sglang_server, tiny_model_folder, allowed
):
    """Our servers let only the admin key abort, others let anybody."""

    async def scenario():
        async with client_of(sglang_server) as client:
            if allowed:
                client._post_abort = abort_as_admin
            rid = new_rid()
            task = asyncio.create_task(client.generate(CONTEXT, Sampling(max_tokens=1000), rid=rid))
            while rid not in client._live or not (await client.loads()).running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            await client.abort(rid)
            reply = await task
            await idle(client)
            return reply

    async def abort_as_admin(rid):
        await post_as_admin(sglang_server, "abort_request", {"rid": rid})
        return True

    reply = asyncio.run(scenario())
    assert reply.finish_reason is FinishReason.ABORT
    assert 0 < len(reply.token_ids) < 1000
    assert set(reply.policy_versions) == {7}
    _, expected = plain_logprobs(tiny_model_folder, CONTEXT, reply.token_ids)
    assert reply.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_weights_that_nobody_verified_give_no_token(sglang_server):
    async def scenario():
        async with client_of(sglang_server, label="unverified") as client:
            with pytest.raises(UnverifiedWeights, match="unverified"):
                await client.generate(CONTEXT, Sampling(max_tokens=40), rid=new_rid())
            await idle(client)

    asyncio.run(scenario())


def test_a_request_that_is_too_long_is_refused_and_the_server_lives(sglang_server):
    async def scenario():
        async with client_of(sglang_server) as client:
            with pytest.raises(ValueError, match="context length"):
                await client.generate(CONTEXT, Sampling(max_tokens=5000), rid=new_rid())
            return await client.generate(CONTEXT, Sampling(max_tokens=3), rid=new_rid())

    assert len(asyncio.run(scenario()).token_ids) == 3


def test_tokens_have_the_version_that_sampled_them_through_loads_in_flight(
    sglang_server, tiny_model_folder
):
    async def scenario():
        await relabel(sglang_server, "7")
        try:
            async with pool_of(endpoint_of(sglang_server)) as pool:
                tasks = [
                    asyncio.create_task(
                        pool.generate(CONTEXT, Sampling(max_tokens=600), request_id=f"{i}")
                    )
                    for i in range(4)
                ]
                member = pool._router.members["e0"]
                for version in ("8", "9"):
                    while member.in_flight < 4 or member.foreign:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(0.3)
                    await load_same_weights(sglang_server, tiny_model_folder, version)
                return await asyncio.gather(*tasks), pool.take_stats(), pool.policy_version
        finally:
            await relabel(sglang_server, "unverified")

    generations, stats, version = asyncio.run(scenario())
    assert version == 9
    boundaries = 0
    for generation in generations:
        versions = generation.policy_versions.tolist()
        assert sorted(set(versions)) == [7, 8, 9]
        boundaries += 2 * len(CONTEXT) + versions.index(8) + versions.index(9)
        _, expected = plain_logprobs(tiny_model_folder, CONTEXT, generation.token_ids.tolist())
        assert generation.logprobs.tolist() == pytest.approx(expected, abs=TOLERANCE)
    assert stats.reprefilled_tokens == boundaries


@pytest.mark.timeout(300)
def test_a_killed_server_hands_its_requests_over_without_losing_or_repeating_a_token(
    sglang_server, sglang_settings, tiny_model_folder, tmp_path
):
    async def scenario():
        process = EngineProcess(sglang_settings(tmp_path / "server.log"))
        victim = await process.start()
        try:
            for server in (victim, sglang_server):
                await relabel(server, "7")
            async with pool_of(endpoint_of(victim, "victim")) as pool:
                tasks = [
                    asyncio.create_task(
                        pool.generate(CONTEXT, Sampling(max_tokens=900), request_id=f"{i}")
                    )
                    for i in range(8)
                ]
                member = pool._router.members["victim"]
                while member.in_flight < 8:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(1.0)
                pool.set_engines([endpoint_of(victim, "victim"), endpoint_of(sglang_server)])
                os.killpg(victim.pid, signal.SIGKILL)
                generations = await asyncio.gather(*tasks)
                return generations, pool.suspects(), pool.take_stats()
        finally:
            await process.stop(timeout_s=1.0)
            await relabel(sglang_server, "unverified")

    generations, suspects, stats = asyncio.run(scenario())
    assert suspects == ("victim",)
    # Less than 8 whole contexts: the second server went on where the first had ended.
    assert 2 * 8 * len(CONTEXT) < stats.prefilled_tokens < 8 * 900
    for generation in generations:
        assert len(generation.token_ids) == 900
        assert set(generation.policy_versions.tolist()) == {7}
        _, expected = plain_logprobs(tiny_model_folder, CONTEXT, generation.token_ids.tolist())
        assert generation.logprobs.tolist() == pytest.approx(expected, abs=TOLERANCE)
