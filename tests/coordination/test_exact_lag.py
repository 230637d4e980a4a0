"""With versions published late and a batch in lock step, every token is exactly as old as asked."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.lab.late_publishing import LatePublishing
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.types import DroppedGroup, DropReason
from tests.coordination.groups import LARGEST_GROUP_BYTES, make_group


class Weights:
    def __init__(self, policy_version: int) -> None:
        self.policy_version = policy_version

    def release(self) -> None:
        pass


class World:
    """A learner, engines that load late and apart, and episodes that end in any order."""

    def __init__(self, *, lag: int, groups_per_step: int, num_engines: int, seed: int) -> None:
        rule = StalenessRule(name="mask", max_staleness=lag, groups_per_step=groups_per_step)
        self.ledger = GroupLedger(
            admission=Admission(
                groups_per_step=groups_per_step,
                max_staleness=0,
                publishing_lag=lag,
                largest_group_bytes=LARGEST_GROUP_BYTES,
                capacity_bytes=100 * LARGEST_GROUP_BYTES,
            ),
            buffer=ReplayBuffer(groups_per_step=groups_per_step, rule=rule),
            rule=rule,
        )
        self.random = random.Random(seed)
        self.engines = {f"engine {i}": 0 for i in range(num_engines)}
        for name in self.engines:
            self.ledger.engine_joined(name, 0)
        self.pending: dict[str, list[int]] = {name: [] for name in self.engines}
        self.late = LatePublishing(self._send, lag=lag)
        self.playing: dict[int, tuple[str, list[int]]] = {}
        self.version = 0
        self.trained: list[tuple[int, set[int]]] = []

    def _send(self, weights: Weights) -> None:
        for versions in self.pending.values():
            versions.append(weights.policy_version)

    def act(self) -> None:
        """Do one thing that could happen now."""
        while (slot := self.ledger.try_admit()) is not None:
            self.playing[slot.group_id] = (self.random.choice(list(self.engines)), [])
        actions = [self.train]
        actions += [self.load] * any(self.pending.values())
        actions += [self.token, self.finish] * bool(self.playing)
        self.random.choice(actions)()

    def load(self) -> None:
        name = self.random.choice([n for n, versions in self.pending.items() if versions])
        self.engines[name] = self.pending[name].pop(0)
        self.ledger.engine_loaded(name, self.engines[name])

    def token(self) -> None:
        engine, versions = self.playing[self.random.choice(list(self.playing))]
        if len(versions) < 4:
            versions.append(self.engines[engine])

    def finish(self) -> None:
        group_id = self.random.choice(list(self.playing))
        engine, versions = self.playing.pop(group_id)
        if self.random.random() < 0.2:
            reason = DropReason.ENVIRONMENT_ERROR
            self.ledger.drop(DroppedGroup(group_id=group_id, reason=reason))
            return
        versions = versions or [self.engines[engine]]
        self.ledger.insert(make_group(group_id, [versions, versions]))

    def train(self) -> None:
        batch = self.ledger.sample(self.version).batch
        if batch is None:
            return
        if self.random.random() < 0.2:
            self.ledger.skip(batch)
            return
        ages = {
            self.version - int(v)
            for sampled in batch.groups
            for trajectory in sampled.group.trajectories
            for v in trajectory.policy_versions[trajectory.sampled]
        }
        self.trained.append((self.version, ages))
        self.version += 1
        self.ledger.commit(batch, self.version)
        self.late.publish(Weights(self.version))


@settings(max_examples=60, deadline=None)
@given(
    lag=st.integers(0, 6),
    groups_per_step=st.integers(1, 4),
    num_engines=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_after_the_warm_up_every_token_is_exactly_lag_versions_old(
    lag: int, groups_per_step: int, num_engines: int, seed: int
):
    world = World(lag=lag, groups_per_step=groups_per_step, num_engines=num_engines, seed=seed)
    steps = lag + 5
    for _ in range(400 * steps):
        if len(world.trained) >= steps:
            break
        world.act()
    assert len(world.trained) >= steps, "the run came to a halt"
    for version, ages in world.trained:
        assert ages == {min(version, lag)}
