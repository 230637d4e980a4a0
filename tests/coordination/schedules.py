"""Random configurations and schedules for the world."""

from __future__ import annotations

import random

from tests.coordination.groups import LARGEST_GROUP_BYTES
from tests.coordination.world import World, WorldConfig


def random_config(rng: random.Random, **fixed) -> WorldConfig:
    rule = fixed.get("rule", rng.choice(["mask", "drop", "pace"]))
    groups_per_step = fixed.get("groups_per_step", rng.randint(1, 3))
    values = {
        "rule": rule,
        "max_staleness": rng.randint(0, 4),
        "groups_per_step": groups_per_step,
        "max_times_sampled": 1 if rule == "pace" else rng.choice([1, 1, 2, 3]),
        "selector": "fifo" if rule == "pace" else rng.choice(["fifo", "uniform"]),
        "num_engines": rng.randint(1, 3),
        "capacity_groups": rng.choice([None, None, groups_per_step, groups_per_step + 2]),
        "spare_bytes": rng.choice([1, LARGEST_GROUP_BYTES, 3 * LARGEST_GROUP_BYTES, 1 << 20]),
        "seed": rng.randrange(1000),
    }
    return WorldConfig(**{**values, **fixed})


def play(world: World, rng: random.Random, *, num_events: int) -> None:
    """Drive the world with random events, then drain it; each run has its own mix of events."""
    events = {
        "admit": 6,
        "generate": 8,
        "finish": 6,
        "fail": 0.4,
        "load": 5,
        "join": 0.4,
        "leave": 0.4,
        "prefetch": 2,
        "give_back": 1,
        "start_step": 6,
        "publish_early": 0.5,
        "commit": 5,
        "skip": 0.4,
        "resume": 0.05,
        "drain": 0.05,
        "cycle": 15,
    }
    straggler_rate = rng.choice([0.0, 0.3, 0.6])
    names = list(events)
    weights = [weight * rng.choice([0.2, 1, 1, 3]) for weight in events.values()]
    for _ in range(num_events):
        happen(world, rng, rng.choices(names, weights)[0], straggler_rate)
        world.check()
    world.drain()


def happen(world: World, rng: random.Random, event: str, straggler_rate: float) -> None:
    running = world.ids("in_flight")
    engines = list(world.engines)
    if event == "admit":
        for _ in range(rng.randint(1, 3)):
            world.admit()
    elif event == "generate" and engines:
        for group_id in running:
            if rng.random() < 0.5:
                world.generate(group_id, rng.choice(engines), rng.randint(1, 2))
    elif event == "finish":
        for group_id in running:
            slow = group_id % 10 < 10 * straggler_rate
            if rng.random() < (0.15 if slow else 0.7):
                if engines:
                    world.generate(group_id, rng.choice(engines), 1)
                world.finish(group_id, rng.choice([0, 0, 0, 1]))
    elif event == "fail" and running:
        world.fail(rng.choice(running))
    elif event == "load":
        for engine in engines:
            if rng.random() < 0.7:
                world.load(engine, world.newest_weights - rng.randint(0, 1))
    elif event == "join" and len(engines) < 4:
        world.join_engine(rng.randint(0, world.version))
    elif event == "leave" and engines:
        world.leave_engine(rng.choice(engines))
    elif event == "cycle":
        ahead = rng.choice(["prefetch", "generate"])
        for part in ("load", "admit", "generate", "commit", "admit", "finish", "start_step", ahead):
            happen(world, rng, part, straggler_rate)
    elif event == "prefetch":
        world.prefetch(rng.randint(0, 1))
    elif event == "give_back":
        world.give_back()
    elif event == "start_step":
        world.start_step()
    elif event == "publish_early":
        world.publish_early()
    elif event in ("commit", "skip"):
        world.end_step(finite=event == "commit")
    elif event == "resume":
        world.resume()
    elif event == "drain":
        world.drain()
