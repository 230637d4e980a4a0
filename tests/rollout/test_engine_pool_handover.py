import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.rollout.engine_errors import EngineError, EngineUnavailable, UnverifiedWeights
from skyrl_async.types import FinishReason
from tests.rollout.fake_sglang import FakeSglang, Fault, continuation, servers
from tests.rollout.pool_cases import ask, check_whole, pool_of, until


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from(["cut", "abort"])), max_size=4),
    st.booleans(),
)
def test_whatever_breaks_no_token_is_lost_or_repeated(faults, incremental):
    async def scenario():
        async with (
            servers(2, incremental=incremental) as members,
            pool_of(*members, max_failures=9, poll_interval_s=0.002) as pool,
        ):
            for server in members:
                server.script.extend([Fault(at, kind)] for at, kind in faults)
            return await ask(pool)

    generation = asyncio.run(scenario())
    check_whole(generation)
    assert generation.finish_reason is FinishReason.LENGTH


def test_a_dead_engine_hands_its_requests_over_with_the_tokens_that_it_had_sent():
    async def scenario():
        async with servers(2) as members, pool_of(*members) as pool:
            members[0].script.append([Fault(12, "die")])
            generation = await ask(pool)
            suspects = pool.suspects()
            again = await ask(pool, "7-0/1", context=[1])
            sent = [[len(body["input_ids"]) for body in server.bodies] for server in members]
            limits = [b["sampling_params"]["max_new_tokens"] for b in members[1].bodies]
            return generation, suspects, again, sent, limits

    generation, suspects, again, sent, limits = asyncio.run(scenario())
    check_whole(generation)
    assert suspects == ("e0",)
    assert again.token_ids.tolist() == continuation([1], 30)
    assert sent == [[3], [3 + 9, 1]]
    assert limits == [30 - 9, 30]


def test_an_engine_that_came_back_is_used_again():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            server.script.append([Fault(12, "die")])
            task = asyncio.create_task(ask(pool))
            await until(lambda: server.dead and pool.suspects())
            await until(lambda: server._runner is None)
            await server.start()
            return await task, pool.suspects()

    generation, suspects = asyncio.run(scenario())
    check_whole(generation)
    assert suspects == ()


def test_a_frozen_engine_is_suspected_and_its_requests_go_on_elsewhere():
    async def scenario():
        async with servers(2) as members, pool_of(*members) as pool:
            members[0].script.append([Fault(12, "stall")])
            task = asyncio.create_task(ask(pool))
            await members[0].stalled.wait()
            members[0].answering.clear()
            return await task, pool.suspects()

    generation, suspects = asyncio.run(scenario())
    check_whole(generation)
    assert suspects == ("e0",)


def test_an_engine_that_leaves_gives_its_tokens_to_the_next():
    async def scenario():
        async with servers(2) as members, pool_of(members[0], stall_timeout_s=10) as pool:
            members[0].script.append([Fault(12, "stall")])
            task = asyncio.create_task(ask(pool))
            await members[0].stalled.wait()
            pool.set_engines([members[1].endpoint("e1")])
            await until(lambda: members[0].aborts)
            members[0].go_on.set()
            return await task, [len(body["input_ids"]) for body in members[1].bodies]

    generation, sent = asyncio.run(scenario())
    check_whole(generation)
    assert sent == [3 + 12]


def test_a_partial_goes_to_an_engine_that_is_not_behind_it():
    async def scenario():
        async with servers(3) as members:
            members[0].version = members[2].version = "4"
            async with pool_of(*members) as pool:
                await until(lambda: pool._router.members["e2"].client.known_version == 4)
                members[0].script.append([Fault(12, "die")])
                return await ask(pool), [len(server.bodies) for server in members]

    generation, requests = asyncio.run(scenario())
    check_whole(generation)
    assert requests == [1, 0, 1]
    assert set(generation.policy_versions.tolist()) == {4}


def test_if_all_engines_are_behind_a_partial_the_turn_starts_again():
    async def scenario():
        async with servers(2) as members:
            members[0].version = "4"
            async with pool_of(*members) as pool:
                await until(lambda: pool._router.members["e0"].client.known_version == 4)
                members[0].script.append([Fault(12, "die")])
                return await ask(pool), [len(b["input_ids"]) for b in members[1].bodies]

    generation, sent = asyncio.run(scenario())
    check_whole(generation)
    assert sent == [3]
    assert set(generation.policy_versions.tolist()) == {3}


def test_an_engine_behind_is_asked_once_more_before_tokens_are_discarded():
    async def scenario():
        async with servers(2) as members:
            members[0].version = "4"
            async with pool_of(*members, poll_interval_s=30.0) as pool:
                members[0].script.append([Fault(12, "die")])
                members[1].version = "4"
                return await ask(pool), [len(b["input_ids"]) for b in members[1].bodies]

    generation, sent = asyncio.run(scenario())
    check_whole(generation)
    assert sent == [3 + 9]


def test_a_request_that_no_engine_serves_fails_in_the_end():
    async def scenario():
        async with FakeSglang() as server, pool_of(server, max_failures=3) as pool:
            server.status = 503
            with pytest.raises(RuntimeError) as caught:
                await ask(pool)
            return caught.value, len(server.bodies)

    error, attempts = asyncio.run(scenario())
    assert isinstance(error, EngineUnavailable)
    assert attempts == 3


def test_unverified_weights_are_not_used_until_they_are_verified():
    async def scenario():
        async with FakeSglang(version="unverified") as server, pool_of(server) as pool:
            task = asyncio.create_task(ask(pool))
            await until(lambda: pool.suspects())
            server.version = "4"
            return await task

    assert set(asyncio.run(scenario()).policy_versions.tolist()) == {4}


def test_a_pinned_pool_fails_with_its_engine():
    async def scenario():
        async with servers(2) as members, pool_of(members[0]) as pool:
            pinned = pool.pinned(members[1].endpoint("e1"))
            runner = asyncio.create_task(pinned.run())
            check_whole(await ask(pinned))
            members[1].script.append([Fault(12, "die")])
            with pytest.raises(EngineError):
                await ask(pinned)
            with pytest.raises(EngineError):
                await ask(pinned)
            runner.cancel()
            return pool.suspects(), len(members[0].bodies)

    assert asyncio.run(scenario()) == ((), 0)


def test_a_port_that_another_server_took_over_is_left():
    async def scenario():
        async with servers(2, api_key="secret") as members, pool_of(*members) as pool:
            members[0].api_key = "of the other server"
            return await ask(pool), pool.suspects()

    generation, suspects = asyncio.run(scenario())
    check_whole(generation)
    assert suspects == ("e0",)


def test_an_engine_that_goes_back_to_older_weights_is_not_trusted():
    async def scenario():
        async with servers(1) as members, pool_of(*members, max_failures=2) as pool:
            members[0].version = "4"
            await until(lambda: pool.policy_version == 4)
            members[0].script.append([Fault(12, "cut")])
            members[0].script.append([Fault(0, "swap", "2")])
            with pytest.raises(UnverifiedWeights, match="2"):
                await ask(pool)

    asyncio.run(scenario())
