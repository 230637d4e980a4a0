"""Driving sessions in tests."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.types import Task

MODULE = "tests.environments.misbehaving"


def make_task(host_name, *, seed=0, **extras):
    return Task(task_id=f"task/{seed}", environment=host_name, seed=seed, extras=extras)


@asynccontextmanager
async def hosted(class_name, options=None, *, close_timeout_s=5.0, **settings):
    """A host, and a function that opens a session of it and resets it."""
    name = f"{MODULE}:{class_name}"
    host = EnvironmentHost(name, options, **settings)

    async def open_session(*, seed=0, **extras):
        session = await host.open(make_task(name, seed=seed, **extras))
        try:
            assert await session.reset() == f"start {seed}"
        except BaseException:
            await session.close()
            raise
        return session

    host.open_session = open_session
    try:
        async with asyncio.timeout(30):
            yield host
    finally:
        async with asyncio.timeout(30):
            await host.close(timeout_s=close_timeout_s)


async def play_to_the_end(host, *, seed):
    session = await host.open_session(seed=seed)
    for count in (1, 2, 3):
        outcome = await session.step("go")
        assert outcome.observation == f"{seed} {count} go"
        assert outcome.reward == 1.0
        assert outcome.terminated is (count == 3)
        assert outcome.truncated is False
    await session.close()


async def failure_of_step(host, reply, *, seed=0):
    """Return the failure of one reply; the session has it once and is closed."""
    session = await host.open_session(seed=seed)
    try:
        with pytest.raises(EnvironmentFailure) as caught:
            await session.step(reply)
    finally:
        await session.close()
    assert caught.value.detail.startswith(f"task/{seed}: ")
    assert "\n" not in caught.value.detail
    return caught.value


async def failure_of_reset(host, **extras):
    with pytest.raises(EnvironmentFailure) as caught:
        await host.open_session(**extras)
    return caught.value
