import asyncio
import contextlib
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.rollout.actor import Engine
from skyrl_async.rollout.engine_errors import EngineError, EngineUnavailable, UnverifiedWeights
from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.rollout.engine_routing import ConcurrencyLimit
from skyrl_async.types import FinishReason, Sampling
from tests.rollout.fake_sglang import (
    VOCAB_SIZE,
    FakeSglang,
    Fault,
    continuation,
    logprob_of,
    servers,
)

CONTEXT = [5, 6, 7]


@contextlib.asynccontextmanager
async def pool_of(*members, version=3, **options):
    """A running pool of ``members``, named e0, e1 and so on."""
    values = {"poll_interval_s": 0.02, "stream_interval": 4, "stall_timeout_s": 0.2}
    pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=512, **{**values, **options})
    runner = asyncio.create_task(pool.run())
    pool.set_engines(endpoints_of(members, version=version))
    await until(lambda: all(m.greeted or m.failure for m in pool._router.members.values()))
    try:
        yield pool
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


def endpoints_of(members, *, version=3):
    return [server.endpoint(f"e{i}", version) for i, server in enumerate(members)]


def ask(pool, name="7-0/0", *, session=None, max_tokens=30, context=CONTEXT, **options):
    sampling = Sampling(max_tokens=max_tokens, **options)
    return pool.generate(context, sampling, request_id=name, session_id=session)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def check_whole(generation, count=30):
    """It is what one undisturbed server would have generated."""
    expected = continuation(CONTEXT, count)
    assert generation.token_ids.tolist() == expected
    assert generation.logprobs.tolist() == pytest.approx([logprob_of(t) for t in expected])


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
        async with servers(2) as members, pool_of(members[0]) as pool:
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


def test_unverified_weights_are_not_used_until_they_are_verified():
    async def scenario():
        async with FakeSglang(version="unverified") as server, pool_of(server) as pool:
            task = asyncio.create_task(ask(pool))
            await until(lambda: pool.suspects())
            server.version = "4"
            return await task

    assert set(asyncio.run(scenario()).policy_versions.tolist()) == {4}


def test_greedy_logprobs_are_those_of_temperature_one():
    async def scenario():
        async with FakeSglang() as server, pool_of(server) as pool:
            return await ask(pool, temperature=0.0)

    assert asyncio.run(scenario()).temperature == 1.0


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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"server_version": "0.5.1"}, "too old"), ({"api_key": "other"}, "401")],
)
def test_an_engine_that_can_never_be_used_ends_the_pool(options, message):
    async def scenario():
        async with FakeSglang(**options) as server:
            pool = EnginePool(vocab_size=VOCAB_SIZE, context_length=64)
            endpoint = server.endpoint()
            if server.api_key:
                server.api_key = "rotated"
            pool.set_engines([endpoint])
            waiting = asyncio.create_task(ask(pool))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match=message):
                await pool.run()
            with pytest.raises(RuntimeError, match="stopped"):
                await waiting
            with pytest.raises(RuntimeError, match="stopped"):
                await ask(pool)

    asyncio.run(scenario())


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
