"""Requests that name an adapter, whose version is that of their tokens."""

import asyncio
import json

import pytest

from skyrl_async.rollout.engine_errors import (
    AdapterGone,
    BadReply,
    UnverifiedWeights,
    error_of_status,
)
from skyrl_async.rollout.engine_launch import ServedAdapters
from skyrl_async.rollout.sglang_protocol import StreamedReply, adapter_name, adapter_version
from skyrl_async.rollout.sglang_server_info import adapter_problem, newest_adapter
from skyrl_async.types import FinishReason
from tests.rollout.fake_sglang import FakeSglang, Fault
from tests.rollout.pool_cases import ask, check_whole, endpoints_of, pool_of, until

LABEL = "unverified"


def serving(*names, **options):
    return FakeSglang(version=LABEL, adapters=list(names), **options)


def adapters_of(server):
    return [body["lora_path"] for body in server.bodies]


def test_a_name_stands_for_one_version():
    assert [adapter_version(adapter_name(v)) for v in (0, 7, 123)] == [0, 7, 123]
    others = ("the/model", "v", "7", "v07", "v-1", "v7 ", "w7", "v٣", "vv7", None, 7)
    assert [adapter_version(name) for name in others] == [None] * len(others)


def test_the_newest_adapter_of_ours_is_found_among_models():
    names = ["the/model", "v9", "somebody's", "v10"]
    assert newest_adapter({"data": [{"id": name} for name in names]}) == 10
    with pytest.raises(UnverifiedWeights, match="no adapter of ours"):
        newest_adapter({"data": [{"id": "the/model"}]})
    with pytest.raises(BadReply, match="/v1/models"):
        newest_adapter({"models": []})


def test_every_token_has_the_version_of_the_adapter_whatever_the_servers_label():
    async def scenario():
        async with serving("v3") as server, pool_of(server, adapters=True) as pool:
            first = await ask(pool, "a", session="7-0")
            server.adapters.append("v4")
            pool.set_engines(endpoints_of([server], version=4))
            second = await ask(pool, "b", session="7-0")
            return first, second, pool.policy_version, server.bodies

    first, second, version, bodies = asyncio.run(scenario())
    for generation, expected in ((first, 3), (second, 4)):
        check_whole(generation)
        assert generation.policy_versions.tolist() == [expected] * 30
    assert [body["lora_path"] for body in bodies] == ["v3", "v4"]
    assert version == 4


def test_a_pinned_pool_names_the_adapter_of_its_endpoint():
    async def scenario():
        async with serving("v3") as server, pool_of(server, adapters=True) as pool:
            pinned = pool.pinned(server.endpoint("e0", 3))
            runner = asyncio.create_task(pinned.run())
            generation = await ask(pinned)
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)
            return generation, adapters_of(server)

    generation, names = asyncio.run(scenario())
    assert generation.policy_versions.tolist() == [3] * 30 and names == ["v3"]


@pytest.mark.parametrize("incremental", [False, True])
def test_a_request_that_ends_for_a_newer_adapter_goes_on_with_it(incremental):
    async def scenario():
        async with (
            serving("v3", incremental=incremental) as server,
            pool_of(server, adapters=True, max_failures=1) as pool,
        ):
            server.script.append([Fault(11, "adapter", "v5"), Fault(11, "abort")])
            server.script.append([Fault(4, "adapter", "v6"), Fault(4, "abort")])
            generation = await ask(pool)
            return generation, pool.suspects(), adapters_of(server)

    generation, suspects, names = asyncio.run(scenario())
    check_whole(generation)
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.policy_versions.tolist() == [3] * 11 + [5] * 4 + [6] * 15
    assert suspects == () and names == ["v3", "v5", "v6"]


def test_a_request_of_an_adapter_that_is_gone_takes_the_newest():
    async def scenario():
        async with serving("v3") as server, pool_of(server, adapters=True, max_failures=1) as pool:
            server.adapters = ["v8"]
            generation = await ask(pool)
            return generation, pool.suspects(), adapters_of(server)

    generation, suspects, names = asyncio.run(scenario())
    check_whole(generation)
    assert generation.policy_versions.tolist() == [8] * 30
    assert suspects == () and names == ["v3", "v8"]


def test_a_server_that_lost_its_adapters_gets_no_requests_until_it_has_one():
    async def scenario():
        async with (
            serving("v3") as server,
            pool_of(server, adapters=True, max_failures=50) as pool,
        ):
            server.adapters = []
            task = asyncio.create_task(ask(pool))
            await until(pool.suspects)
            server.adapters = ["v9"]
            return await task

    generation = asyncio.run(scenario())
    check_whole(generation)
    assert generation.policy_versions.tolist() == [9] * 30


def test_an_abort_without_a_newer_adapter_is_a_failure_of_the_server():
    async def scenario():
        async with serving("v3") as server, pool_of(server, adapters=True, max_failures=1) as pool:
            server.script.append([Fault(11, "abort")])
            with pytest.raises(RuntimeError, match="aborted"):
                await ask(pool)

    asyncio.run(scenario())


def test_what_a_broken_stream_brought_is_kept_whole():
    async def scenario():
        async with serving("v3") as server, pool_of(server, adapters=True) as pool:
            server.script.append([Fault(13, "cut")])
            generation = await ask(pool)
            return generation, [len(body["input_ids"]) for body in server.bodies]

    generation, contexts = asyncio.run(scenario())
    check_whole(generation)
    assert generation.policy_versions.tolist() == [3] * 30
    # Chunks end after tokens 1, 5, 9 and 13.
    assert contexts == [3, 3 + 13]


def test_weights_that_change_beneath_an_adapter_are_noticed():
    stream = StreamedReply(known_version=3, by_adapter=True)
    meta = {"completion_tokens": 2, "output_token_logprobs": [[-1.0, 5], [-1.5, 6]]}
    end = {"type": "length"}
    spans = [
        {"version": "unverified", "start": 0, "end": 1},
        {"version": "12", "start": 1, "end": 2},
    ]
    payload = {"output_ids": [5, 6], "meta_info": {**meta, "finish_reason": end}}
    payload["meta_info"]["weight_versions"] = spans
    with pytest.raises(UnverifiedWeights, match="'unverified' and became '12'"):
        stream.feed(json.dumps(payload).encode())


def test_an_unknown_adapter_may_be_asked_for_elsewhere():
    for text in ("Got LoRA adapter that has never been loaded: v1", "no LoRA adapter"):
        error = error_of_status(400, text)
        assert isinstance(error, AdapterGone) and error.retryable


SERVED = ServedAdapters(rank=4, target_modules=("o_proj", "q_proj"), num_slots=4)
FITTING = {
    "version": "0.5.23",
    "enable_lora": True,
    "max_lora_rank": 4,
    "max_loras_per_batch": 4,
    "lora_target_modules": ["q_proj", "o_proj", "down_proj"],
}


def test_a_server_that_fits_the_adapters_is_taken():
    assert adapter_problem(FITTING, SERVED) is None
    assert adapter_problem({**FITTING, "lora_target_modules": ["all"]}, SERVED) is None
    assert adapter_problem({**FITTING, "max_lora_rank": 64}, SERVED) is None


@pytest.mark.parametrize(
    "change",
    [
        {"enable_lora": None},
        {"max_lora_rank": 3},
        {"max_loras_per_batch": 3},
        {"lora_target_modules": ["q_proj"]},
        {"lora_target_modules": None},
    ],
)
def test_a_server_that_does_not_fit_is_refused_with_the_arguments_it_needs(change):
    problem = adapter_problem({**FITTING, **change}, SERVED)
    assert problem is not None
    assert "--enable-lora --max-lora-rank 4 --max-loras-per-batch 4" in problem
    assert "--lora-target-modules o_proj q_proj" in problem


def test_a_server_that_cannot_unload_reliably_is_refused():
    problem = adapter_problem({**FITTING, "version": "0.5.21"}, SERVED)
    assert problem is not None and "sglang>=0.5.23" in problem
