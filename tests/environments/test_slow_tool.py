import asyncio
import time

import pytest

from skyrl_async.environments.slow_tool import SlowTool


async def play(environment, seed=0):
    """Play one episode; return its rewards, and the seconds that it took."""
    await environment.reset(seed=seed)
    started, rewards, terminated = time.monotonic(), [], False
    while not terminated:
        _, reward, terminated, _, _ = await environment.step("anything")
        rewards.append(reward)
    return rewards, time.monotonic() - started


def test_an_episode_has_the_given_turns_and_waits():
    rewards, seconds = asyncio.run(play(SlowTool(latency_s="fixed:0.03", turns="fixed:3")))
    assert len(rewards) == 3
    assert rewards[:2] == [0, 0] and rewards[2] in (0, 1)
    assert 0.09 <= seconds < 0.3


def test_members_of_a_group_differ():
    async def main():
        return [await play(SlowTool(turns="uniform:1,6")) for _ in range(40)]

    episodes = [rewards for rewards, _ in asyncio.run(main())]
    assert {len(rewards) for rewards in episodes} > {2, 4}
    assert {rewards[-1] for rewards in episodes} == {0, 1}


def test_another_form_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="is no distribution"):
        SlowTool(latency_s="slow")
