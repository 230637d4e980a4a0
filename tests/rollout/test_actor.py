from __future__ import annotations

import asyncio

import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.actor import RolloutActor
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.rollout.slots import PARTS
from skyrl_async.types import (
    DroppedGroup,
    DropReason,
    RolloutReport,
    TrajectoryGroup,
)
from tests.fakes import FakeClock
from tests.rollout.actor_cases import (
    EIGHT,
    LONG_S,
    STOP,
    assignments,
    make_actor,
    one_turn,
    run,
)
from tests.rollout_fakes import FakeEngine, FakeSession, FakeSessions, outcome


async def groups_of(actor: RolloutActor, count: int) -> list[TrajectoryGroup | DroppedGroup]:
    groups: list[TrajectoryGroup | DroppedGroup] = []
    while len(groups) < count:
        groups += (await actor.poll(wait_s=LONG_S)).groups
    return groups


def test_groups_are_in_flight_together():
    all_live = asyncio.Event()

    async def until_all_are_live(call):
        if len(engine.live) == 6:
            all_live.set()
        await all_live.wait()

    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=until_all_are_live)
    sessions = FakeSessions(one_turn)

    async def body(start):
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0, 1))
        actor.submit(assignments(2))
        return await groups_of(actor, 3)

    groups = run(body)

    assert engine.most_live == 6
    assert sorted(group.group_id for group in groups) == [0, 1, 2]
    for group in groups:
        assert group.task_id == f"t/{group.group_id}"
        assert [t.reward for t in group.trajectories] == [float(group.group_id)] * 2
    assert len(sessions.opened) == 6 and sessions.all_closed
    assert sorted(engine.released) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]


def test_finished_group_is_reported_once_and_a_quiet_poll_is_empty():
    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(one_turn)))
        actor.submit(assignments(4))
        first = await actor.poll(wait_s=LONG_S)
        assert [group.group_id for group in first.groups] == [4]
        for _ in range(2):
            report = await actor.poll(wait_s=0.01)
            assert isinstance(report, RolloutReport) and report.groups == ()

    run(body)


def test_groups_that_finish_within_the_interval_share_a_report():
    released = [asyncio.Event() for _ in range(4)]

    async def until_released(call):
        await released[int(call.session_id.split("-")[0])].wait()

    class ReleasesTheNext(FakeSession):
        """The end of a group's first session lets the next group go on."""

        async def close(self):
            await super().close()
            following = self.number + 1
            if 2 <= following < 4:
                released[following].set()

    def make(task):
        session = ReleasesTheNext("guess", outcome(terminated=True))
        session.number = task.seed
        return session

    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=until_released)

    async def body(start):
        actor = start(make_actor(engine, FakeSessions(make), report_interval_s=0.1))
        actor.submit(assignments(0, 1, 2, 3))
        released[0].set()
        first = await actor.poll(wait_s=LONG_S)
        released[1].set()
        second = await actor.poll(wait_s=LONG_S)
        return [[group.group_id for group in r.groups] for r in (first, second)]

    assert run(body) == [[0], [1, 2, 3]], "the first is not held back, the others come together"


def test_group_without_enough_members_is_reported_as_dropped():
    def make(task):
        broken = EnvironmentFailure(DropReason.ENVIRONMENT_ERROR, f"{task.task_id}: boom")
        return FakeSession("guess", broken if task.seed else outcome(terminated=True))

    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(make)))
        actor.submit(assignments(0, 1))
        return {group.group_id: group for group in await groups_of(actor, 2)}

    groups = run(body)

    assert isinstance(groups[0], TrajectoryGroup)
    assert groups[1] == DroppedGroup(
        group_id=1,
        reason=DropReason.ENVIRONMENT_ERROR,
        failures=(DropReason.ENVIRONMENT_ERROR,) * 2,
        detail="t/1: boom",
    )


def test_swap_wakes_a_poll_that_reports_the_new_version():
    async def body(start):
        engine = FakeEngine(lambda call: [EIGHT, STOP])
        actor = start(make_actor(engine, FakeSessions(one_turn)))
        polling = asyncio.create_task(actor.poll(wait_s=LONG_S))
        await asyncio.sleep(0)
        engine.swap(3)
        actor.engine_swapped()
        report = await polling
        assert (report.engine_version, report.groups) == (3, ())

    run(body)


def test_report_says_where_the_time_of_engine_and_slots_went():
    clock = FakeClock()

    async def think(call):
        clock.now += 3

    async def body(start):
        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=think)
        actor = start(make_actor(engine, FakeSessions(one_turn), clock=clock))
        actor.submit(assignments(0))
        return await actor.poll(wait_s=LONG_S)

    started_s = clock.now
    report = run(body)

    assert sum(report.seconds.values()) == 2 * (clock.now - started_s) == 2 * 2 * 3
    assert report.seconds["generate"] >= 2 * 3 and report.seconds["wait_admission"] == 0
    assert report.seconds.keys() == set(PARTS)
    assert report.engine_seconds == {
        "generate": 1.75,
        "swap": 0.25,
        "wait_episodes": 1.0,
        "idle": 1.0,
    }
    assert report.counts["generated_tokens"] == 4
    assert report.counts["reprefilled_tokens"] == 3
    assert report.maxima["longest_gap_decode_steps"] == 2.0


def test_death_of_the_engine_surfaces_in_the_waiting_poll_and_in_every_later_one():
    async def body(start):
        blocked = asyncio.Event()

        async def block(call):
            blocked.set()
            await asyncio.Event().wait()

        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=block)
        sessions = FakeSessions(one_turn)
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0))
        polling = asyncio.create_task(actor.poll(wait_s=LONG_S))
        await blocked.wait()
        engine.die(ValueError("the weights are gone"))
        for poll in (polling, actor.poll(wait_s=LONG_S)):
            with pytest.raises(RuntimeError, match=r"rollout actor.*the weights are gone"):
                await poll
        await actor.close()
        assert sessions.all_closed and sorted(engine.released) == ["0-0", "0-1"]

    run(body)


def test_programming_error_in_a_group_surfaces_in_poll():
    def make(task):
        return FakeSession("guess", ZeroDivisionError("a bug"))

    async def body(start):
        actor = start(make_actor(FakeEngine(lambda call: [EIGHT, STOP]), FakeSessions(make)))
        actor.submit(assignments(0))
        with pytest.raises(RuntimeError, match=r"ZeroDivisionError\('a bug'\)"):
            await actor.poll(wait_s=LONG_S)

    run(body)


def test_close_cancels_groups_and_frees_their_environments():
    async def body(start):
        all_live = asyncio.Event()

        async def block(call):
            if len(engine.live) == 4:
                all_live.set()
            await asyncio.Event().wait()

        engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=block)
        sessions = FakeSessions(one_turn)
        actor = start(make_actor(engine, sessions))
        actor.submit(assignments(0, 1))
        await all_live.wait()
        await actor.close()
        assert len(sessions.opened) == 4 and sessions.all_closed
        assert not engine.live and len(engine.released) == 4
        report = await actor.poll(wait_s=0.01)
        assert report.groups == (), "what they had is lost, and being cancelled is no failure"

    run(body)


def test_real_engine_and_environment_fill_whole_groups():
    model = build_tiny_model(hidden_size=16, num_layers=1, num_heads=2)
    engine = EmbeddedEngine(model, max_concurrent=8, context_length=64)

    async def body(start):
        host = EnvironmentHost("number_guess", {"max_guesses": 3}, in_process=True)
        actor = start(make_actor(engine, host, group_size=4))
        actor.submit(assignments(0, 1, 2, 3))
        counts: dict[str, float] = {}
        groups: list[TrajectoryGroup] = []
        while len(groups) < 4:
            report = await actor.poll(wait_s=LONG_S)
            groups += report.groups
            for name, value in report.counts.items():
                counts[name] = counts.get(name, 0) + value
        return groups, counts

    groups, counts = run(body)

    assert sorted(group.group_id for group in groups) == [0, 1, 2, 3]
    assert all(len(group.trajectories) == 4 and not group.failures for group in groups)
    assert counts["generated_tokens"] == sum(group.num_generated_tokens for group in groups)
    for group in groups:
        assert all(t.reward == 1.0 or t.num_turns == 3 for t in group.trajectories)
