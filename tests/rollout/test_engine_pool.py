import asyncio
import inspect

import pytest

from skyrl_async.rollout.actor import Engine
from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.rollout.engine_routing import ConcurrencyLimit
from skyrl_async.types import FinishReason
from tests.rollout.fake_sglang import VOCAB_SIZE, FakeSglang, Fault, servers
from tests.rollout.pool_cases import ask, check_whole, pool_of, until


def test_a_pool_offers_all_that_a_rollout_actor_asks_of_an_engine():
    for name, member in inspect.getmembers(Engine, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(EnginePool, name))
            assert list(ours.parameters) == list(inspect.signature(member).parameters)


def test_a_generation_is_counted_once_with_what_the_client_can_see():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            server.script.append([Fault(10, "swap", "4"), Fault(20, "swap", "5")])
            generation = await ask(pool)
            return generation, pool.take_stats(), pool.take_stats(), pool.policy_version

    generation, stats, later, version = asyncio.run(scenario())
    check_whole(generation)
    assert generation.policy_versions.tolist() == [3] * 10 + [4] * 10 + [5] * 10
    assert generation.finish_reason is FinishReason.LENGTH
    assert version == 5
    assert (stats.finished_requests, stats.generated_tokens) == (1, 30)
    assert stats.prefilled_tokens == 2
    assert stats.reprefilled_tokens == (3 + 10) + (3 + 20)
    assert stats.busy_s > 0
    assert (stats.running, stats.waiting) == (0, 0)
    assert (later.finished_requests, later.generated_tokens, later.busy_s) == (0, 0, 0)
    assert later.idle_s > 0


def test_requests_wait_for_an_engine_to_join_and_an_abort_ends_the_wait():
    async def scenario():
        async with FakeSglang() as server, pool_of() as pool:
            first, second = (asyncio.create_task(ask(pool, name)) for name in "ab")
            await until(lambda: pool.take_stats().waiting == 2)
            pool.abort("b")
            aborted = await second
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await ask(pool, "c")
            pool.set_engines([server.endpoint()])
            return await first, aborted, pool.take_stats()

    generation, aborted, stats = asyncio.run(scenario())
    check_whole(generation)
    assert aborted.finish_reason is FinishReason.ABORT
    assert len(aborted.token_ids) == 0
    assert (stats.running, stats.waiting) == (0, 0)


def test_an_aborted_request_returns_what_was_sampled():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            server.script.append([Fault(12, "stall")])
            task = asyncio.create_task(ask(pool))
            await server.stalled.wait()
            pool.abort("7-0/0")
            await until(lambda: server.aborts)
            server.go_on.set()
            return await task

    generation = asyncio.run(scenario())
    check_whole(generation, 12)
    assert generation.finish_reason is FinishReason.ABORT


def test_a_session_stays_with_its_engine_and_new_ones_go_where_there_is_least_to_do():
    async def scenario():
        async with servers(2) as members, pool_of(*members) as pool:
            await asyncio.gather(*(ask(pool, f"{i}", session=f"7-{i}") for i in range(4)))
            spread = [len(server.bodies) for server in members]
            for turn in range(3):
                await ask(pool, f"{turn}", session="7-0")
            stuck = [len(server.bodies) - n for server, n in zip(members, spread, strict=True)]
            members[0].foreign = 50
            await until(lambda: pool._router.members["e0"].foreign == 50)
            for i in range(3):
                pool.release("7-0")
                await ask(pool, f"{i}", session="7-0")
            return spread, stuck, len(members[1].bodies)

    spread, stuck, on_idle_engine = asyncio.run(scenario())
    assert spread == [2, 2]
    assert sorted(stuck) == [0, 3]
    assert on_idle_engine == 5 + (3 if stuck[1] else 0)


def test_an_engine_is_given_no_more_requests_than_its_limit():
    most = []

    async def scenario():
        async with FakeSglang() as server, pool_of(server, max_concurrent=3) as pool:
            server.running.clear()
            tasks = [asyncio.create_task(ask(pool, f"{i}")) for i in range(8)]
            server.running.set()
            await until(lambda: server.num_live)
            while not all(task.done() for task in tasks):
                most.append(server.num_live)
                await asyncio.sleep(0)
            return await asyncio.gather(*tasks)

    for generation in asyncio.run(scenario()):
        check_whole(generation)
    assert max(most) <= 3


def test_the_limit_falls_by_a_factor_when_the_cache_is_full_and_rises_in_steps():
    limit = ConcurrencyLimit(64)
    limit.observe(0.95, in_flight=64)
    assert limit.value == 48
    limit.observe(0.95, in_flight=60)
    assert limit.value == 48
    limit.observe(0.95, in_flight=48)
    assert limit.value == 36
    limit.observe(0.5, in_flight=36)
    assert limit.value == 38
    for _ in range(100):
        limit.observe(0.5, in_flight=0)
    assert limit.value == 64
    for _ in range(100):
        limit.observe(1.0, in_flight=0)
    assert limit.value == 1


def test_prefix_caches_are_named_by_version_or_by_group():
    async def keys(**options):
        async with FakeSglang() as server, pool_of(server, **options) as pool:
            await ask(pool, "a", session="7-0")
            server.version = "4"
            await until(lambda: pool.policy_version == 4)
            await ask(pool, "b", session="7-0")
            await ask(pool, "c", session="7-1")
            pool.release("7-0")
            await ask(pool, "d", session="7-0")
            await ask(pool, "e")
            return [body["extra_key"] for body in server.bodies]

    assert asyncio.run(keys()) == ["3", "4", "4", "4", "4"]
    assert asyncio.run(keys(kv_after_swap="keep")) == ["7@3", "7@3", "7@4", "7@4", "e@4"]


def test_kept_caches_are_not_counted_as_recomputed():
    async def scenario():
        async with FakeSglang() as server, pool_of(server, kv_after_swap="keep") as pool:
            server.script.append([Fault(10, "swap", "4")])
            await ask(pool)
            return pool.take_stats().reprefilled_tokens

    assert asyncio.run(scenario()) == 0


def test_a_bad_request_is_not_tried_elsewhere():
    async def scenario():
        async with servers(2) as members, pool_of(*members) as pool:
            with pytest.raises(ValueError, match="token ids"):
                await ask(pool, context=[VOCAB_SIZE])
            with pytest.raises(ValueError, match="context_length"):
                await ask(pool, context=[1] * 512)
            task = asyncio.create_task(ask(pool))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="in use"):
                await ask(pool)
            await task
            return sum(len(server.bodies) for server in members), pool.suspects()

    assert asyncio.run(scenario()) == (1, ())


def test_a_reply_fits_into_the_context():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            return await ask(pool, context=[1] * 500, max_tokens=30)

    generation = asyncio.run(scenario())
    assert len(generation.token_ids) == 12
    assert generation.finish_reason is FinishReason.LENGTH


def test_greedy_logprobs_are_those_of_temperature_one():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            return await ask(pool, temperature=0.0)

    assert asyncio.run(scenario()).temperature == 1.0


def test_an_engine_that_is_too_old_ends_the_pool():
    async def scenario():
        async with FakeSglang(server_version="0.5.1") as server:
            pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=64)
            pool.set_engines([server.endpoint()])
            waiting = asyncio.create_task(ask(pool))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="too old"):
                await pool.run()
            with pytest.raises(RuntimeError, match="stopped"):
                await waiting
            with pytest.raises(RuntimeError, match="stopped"):
                await ask(pool)

    asyncio.run(scenario())


def test_weights_are_not_loaded_through_a_pool():
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=64)
    for call in (pool.pause, pool.resume, lambda: pool.load_weights({}, policy_version=1)):
        with pytest.raises(RuntimeError, match="worker"):
            asyncio.run(call())


def test_engines_of_one_name_and_bad_settings_are_refused():
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=64)
    server = FakeSglang()
    server.port = 1
    with pytest.raises(ValueError, match="differ"):
        pool.set_engines([server.endpoint(), server.endpoint()])
    with pytest.raises(ValueError, match="max_concurrent=0"):
        EnginePool(vocab_size=1, context_length=8, max_concurrent=0)
    with pytest.raises(ValueError, match="kv_after_swap"):
        EnginePool(vocab_size=1, context_length=8, kv_after_swap="forget")
