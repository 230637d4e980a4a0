"""Random schedules against the invariants, and seeded bugs against the random schedules."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.coordination.schedules import play, random_config
from tests.coordination.seeded_bugs import BUGS
from tests.coordination.world import InvariantError, World

small = st.integers(0, 7)


class LedgerMachine(RuleBasedStateMachine):
    world: World

    @initialize(seed=st.integers(0, 10_000))
    def start(self, seed):
        self.world = World(random_config(random.Random(seed)))

    def pick(self, values, index):
        values = list(values)
        return values[index % len(values)]

    @rule(times=st.integers(1, 4))
    def admit(self, times):
        for _ in range(times):
            self.world.admit()

    @precondition(lambda self: self.world.ids("in_flight") and self.world.engines)
    @rule(group=small, engine=small, num_tokens=st.integers(1, 3))
    def generate(self, group, engine, num_tokens):
        group_id = self.pick(self.world.ids("in_flight"), group)
        self.world.generate(group_id, self.pick(self.world.engines, engine), num_tokens)

    @precondition(lambda self: self.world.ids("in_flight"))
    @rule(group=small, failed_members=st.integers(0, 1))
    def finish(self, group, failed_members):
        self.world.finish(self.pick(self.world.ids("in_flight"), group), failed_members)

    @precondition(lambda self: self.world.ids("in_flight"))
    @rule(group=small)
    def fail(self, group):
        self.world.fail(self.pick(self.world.ids("in_flight"), group))

    @precondition(lambda self: self.world.engines)
    @rule(engine=small, behind=st.integers(0, 1))
    def load(self, engine, behind):
        self.world.load(self.pick(self.world.engines, engine), self.world.newest_weights - behind)

    @precondition(lambda self: len(self.world.engines) < 4)
    @rule(behind=st.integers(0, 3))
    def join(self, behind):
        self.world.join_engine(self.world.version - behind)

    @precondition(lambda self: self.world.engines)
    @rule(engine=small)
    def leave(self, engine):
        self.world.leave_engine(self.pick(self.world.engines, engine))

    @rule(guess=st.integers(0, 1))
    def prefetch(self, guess):
        self.world.prefetch(guess)

    @precondition(lambda self: self.world.prefetched is not None)
    @rule()
    def give_back(self):
        self.world.give_back()

    @precondition(lambda self: self.world.training is None)
    @rule()
    def start_step(self):
        self.world.start_step()

    @precondition(lambda self: self.world.training is not None)
    @rule()
    def publish_early(self):
        self.world.publish_early()

    @precondition(lambda self: self.world.training is not None)
    @rule(finite=st.sampled_from([True, True, True, False]))
    def end_step(self, finite):
        self.world.end_step(finite=finite)

    @rule(kind=st.sampled_from(["resume", "drain", "go on", "go on"]))
    def rarely(self, kind):
        if kind == "resume":
            self.world.resume()
        elif kind == "drain":
            self.world.drain()

    @invariant()
    def ledger_equals_the_book(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


def test_invariants_hold_under_generated_schedules():
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=60,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("staleness_rule", ["mask", "drop", "pace"])
def test_invariants_hold_under_long_random_schedules(staleness_rule):
    steps = 0
    for seed in range(30):
        rng = random.Random(f"{staleness_rule}/{seed}")
        world = World(random_config(rng, rule=staleness_rule, max_staleness=seed % 5))
        play(world, rng, num_events=400)
        steps += world.steps
        assert max(world.trained) <= seed % 5
    assert steps > 200


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_seeded_bug_is_caught(bug):
    for seed in range(200):
        rng = random.Random(f"bug/{seed}")
        config = random_config(rng, **bug.settings)
        try:
            play(World(config, bug.parts), rng, num_events=200)
        except (InvariantError, RuntimeError) as error:
            assert re.search(bug.caught_by, str(error)), error
            return
    pytest.fail("no schedule caught it")
