"""The pool of engines under deaths, restarts, lost pairs and evaluations, in any order."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coordination.fleet_bench import NAMES, Bench, Endpoint, bench_test


@bench_test
async def test_no_engine_plays_before_it_has_loaded_a_verified_version(bench):
    await bench.until(lambda: all(engine.address for engine in bench.engines.values()))
    assert bench.fleet.pool == () and bench.pools == []

    bench.engines["engine 1"].load()
    await bench.until(lambda: bench.fleet.pool == ("engine 1",))
    assert bench.pools[-1] == (Endpoint("engine 1", 1),)

    await bench.until_all_play()
    assert set(bench.pools[-1]) == {Endpoint("engine 0", 1), Endpoint("engine 1", 1)}


@bench_test
async def test_live_version_is_the_smallest_of_the_pool_and_a_dead_engine_does_not_hold_it_back(
    bench,
):
    await bench.until_all_play()
    bench.learner.step()
    bench.engines["engine 0"].load()
    await bench.until(lambda: not bench.engines["engine 0"].news.is_set())
    assert bench.admission.live_version == 0

    bench.engines["engine 1"].die()
    await bench.until(lambda: bench.fleet.pool == ("engine 0",))
    await bench.until(lambda: bench.admission.live_version == 1)
    assert bench.pools[-1] == (Endpoint("engine 0", 1),)
    assert "engine 1" not in bench.learner.pairs, "its sender is given up"


@bench_test
async def test_actors_know_a_named_version_before_it_is_live(bench):
    for engine in bench.engines.values():
        engine.named = True
    await bench.until_all_play()
    bench.learner.step()
    for engine in bench.engines.values():
        engine.load()
    await bench.until(lambda: bench.admission.live_version == 1)
    assert set(bench.pools[-1]) == {Endpoint(name, 1, 1) for name in NAMES}
    assert bench.live_when_told[-1] == 0, "told first, counted then"


@bench_test
async def test_versions_that_replies_carry_are_not_announced(bench):
    await bench.until_all_play()
    told = len(bench.pools)
    bench.learner.step()
    for engine in bench.engines.values():
        engine.load()
    await bench.until(lambda: bench.admission.live_version == 1)
    assert len(bench.pools) == told


@bench_test
async def test_an_engine_withdrawn_while_its_version_is_announced_is_not_counted(bench):
    for engine in bench.engines.values():
        engine.named = True
    await bench.until_all_play()

    def withdraw():
        # As ``withdrawn`` does before its first wait.
        bench.while_told = lambda: None
        member = bench.fleet._members["engine 0"]
        member.pinned, member.in_pool = True, False
        bench.admission.engine_left("engine 0")

    bench.learner.step()
    bench.while_told = withdraw
    bench.engines["engine 0"].load()
    await bench.until(lambda: "engine 0" not in bench.fleet.pool)
    await bench.until(lambda: not bench.engines["engine 0"].news.is_set())
    assert bench.fleet.pool == ("engine 1",) and bench.admission.live_version == 0


@bench_test
async def test_a_restarted_engine_comes_back_only_with_the_newest_version(bench):
    await bench.until_all_play()
    bench.engines["engine 0"].die()
    await bench.until(lambda: bench.fleet.pool == ("engine 1",))
    bench.learner.step()
    bench.engines["engine 1"].load()
    await bench.until(lambda: bench.admission.live_version == 1)

    bench.engines["engine 0"].come_back()
    await bench.until(lambda: bench.engines["engine 0"].address is not None)
    assert bench.fleet.pool == ("engine 1",)

    bench.engines["engine 0"].load()
    await bench.until(lambda: len(bench.fleet.pool) == 2)
    assert bench.engines["engine 0"].version == 1
    assert Endpoint("engine 0", 2) in bench.pools[-1]


@bench_test
async def test_an_engine_that_loads_what_the_others_have_left_behind_waits_for_the_next(bench):
    await bench.until_all_play()
    one, other = bench.engines.values()
    one.die()
    await bench.until(lambda: bench.fleet.pool == (other.name,))
    one.come_back()
    await bench.until(lambda: one.address is not None)
    bench.learner.step()
    other.load()
    await bench.until(lambda: bench.admission.live_version == 1)

    one.version = 0
    one.news.set()
    await bench.until(lambda: not one.news.is_set())
    await bench.until(lambda: True)
    assert bench.fleet.pool == (other.name,)

    one.load()
    await bench.until(lambda: len(bench.fleet.pool) == 2)
    assert bench.admission.live_version == 1


@bench_test
async def test_an_evaluation_has_an_engine_whose_weights_stay(bench):
    await bench.until_all_play()
    bench.learner.step()
    bench.engines["engine 1"].load()
    await bench.until(lambda: not bench.engines["engine 1"].news.is_set())
    seen = []

    async def play(endpoint):
        seen.append(endpoint)
        assert endpoint.engine not in bench.fleet.pool
        version = bench.engines[endpoint.engine].version
        bench.learner.step()
        for engine in bench.engines.values():
            engine.load()
        await bench.until(lambda: bench.admission.live_version == 2)
        assert bench.engines[endpoint.engine].version == version == 1
        return "played"

    assert await bench.fleet.evaluate(play) == "played"
    assert [endpoint.engine for endpoint in seen] == ["engine 1"], "the newest one is taken"
    await bench.until_all_play()


@bench_test
async def test_an_evaluation_whose_engine_dies_is_played_by_another(bench):
    await bench.until_all_play()
    seen = []

    async def play(endpoint):
        seen.append(endpoint.engine)
        if len(seen) == 1:
            bench.engines[endpoint.engine].die()
            raise RuntimeError("connection lost")
        return "played"

    assert await bench.fleet.evaluate(play) == "played"
    assert len(seen) == 2
    await bench.until_all_play()


@bench_test
async def test_an_evaluation_that_always_fails_says_why(bench):
    await bench.until_all_play()

    async def play(endpoint):
        bench.engines[endpoint.engine].load()
        raise RuntimeError(f"no reply from {endpoint.engine}")

    async def keep_loading():
        while True:
            for engine in bench.engines.values():
                engine.load()
            await asyncio.sleep(0)

    loading = asyncio.create_task(keep_loading())
    try:
        with pytest.raises(RuntimeError, match="no reply from engine"):
            await bench.fleet.evaluate(play)
    finally:
        loading.cancel()


ACTIONS = ("die", "come_back", "load", "lose_pair", "step", "evaluate", "wait")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(NAMES)), max_size=25))
def test_whatever_happens_all_engines_play_again(actions):
    """Admission refuses to count an engine twice, backwards or behind: then the fleet would die."""

    async def main():
        bench = Bench()

        async def play(endpoint):
            await asyncio.sleep(0)

        async with bench.running():
            await bench.until_all_play()
            evaluations = []
            for action, name in actions:
                engine = bench.engines[name]
                if action in ("die", "come_back", "load"):
                    getattr(engine, action)()
                elif action == "lose_pair":
                    bench.learner.pairs.pop(name, None)
                    engine.news.set()
                elif action == "step":
                    bench.learner.step()
                elif action == "evaluate" and all(task.done() for task in evaluations):
                    evaluations.append(asyncio.create_task(bench.fleet.evaluate(play)))
                else:
                    await asyncio.sleep(0)
                live = bench.admission.live_version
                await asyncio.sleep(0)
                assert bench.admission.live_version >= live, "live_version never falls"
            while evaluations and not evaluations[-1].done():
                await bench.until_all_play()
            for task in evaluations:
                with contextlib.suppress(RuntimeError):
                    task.result()
            await bench.until_all_play()
            assert bench.admission.live_version <= bench.learner.version

    asyncio.run(main())
