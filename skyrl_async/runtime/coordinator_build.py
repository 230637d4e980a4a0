"""The coordinator's parts, from the configuration and from where the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_async.config import Config
from skyrl_async.coordination.admission import Admission
from skyrl_async.coordination.coordinator_settings import CoordinatorSettings
from skyrl_async.coordination.guard import CollapseGuard, GuardSettings
from skyrl_async.coordination.ledger import GroupLedger
from skyrl_async.coordination.run_state import RunState
from skyrl_async.coordination.staleness import StalenessRule
from skyrl_async.environments.tasks import heldout_tasks
from skyrl_async.metrics.waste import WasteFacts
from skyrl_async.replay.buffer import ReplayBuffer
from skyrl_async.replay.selectors import fifo, uniform


def make_ledger(config: Config, start: RunState) -> GroupLedger:
    """Return admission and replay buffer, with what a checkpoint kept of them."""
    batch, bound, replay = config.learner.groups_per_step, config.staleness, config.replay
    rule = StalenessRule(name=bound.rule, max_staleness=bound.max, groups_per_step=batch)
    lag = config.lab.exact_lag
    return GroupLedger(
        rule=rule,
        admission=Admission(
            groups_per_step=batch,
            # With an exact lag a batch is played, trained and published before the next one begins.
            max_staleness=bound.max if lag is None else 0,
            publishing_lag=lag or 0,
            largest_group_bytes=config.largest_group_bytes,
            capacity_bytes=replay.capacity_bytes,
            capacity_groups=replay.capacity_groups,
            max_times_sampled=replay.max_times_sampled,
            live_version=start.policy_version,
        ),
        buffer=ReplayBuffer(
            groups_per_step=batch,
            rule=rule,
            selector=fifo if replay.selector == "fifo" else uniform(config.seed + start.step),
            max_times_sampled=replay.max_times_sampled,
        ),
        state=start.ledger_state() if start.groups else None,
    )


def make_guard(config: Config, start: RunState) -> CollapseGuard | None:
    """Return the collapse guard, if it is enabled."""
    values = config.guard.model_dump()
    if not values.pop("enabled"):
        return None
    guard = CollapseGuard(GuardSettings(**values))
    if start.guard is not None:
        guard.restore(start.guard)
    return guard


def coordinator_settings(config: Config) -> CoordinatorSettings:
    """Return the limits of the coordinator's loops."""
    evaluation, environment = config.evaluation, config.environment
    return CoordinatorSettings(
        steps=config.run.steps,
        max_seconds=config.run.max_seconds,
        stop_at_eval_reward=config.run.stop_at_eval_reward,
        evaluation_every_steps=evaluation.every_steps,
        evaluation_tasks=heldout_tasks(environment.name, evaluation.num_tasks),
        max_groups_per_actor=config.rollout.max_groups_per_actor,
        step_timeout_s=config.learner.step_timeout_s,
        publishes_late=bool(config.lab.exact_lag),
        stall_timeout_s=2 * environment.episode_timeout_s + config.weight_sync.timeout_s,
        evaluation_timeout_s=evaluation.timeout_s,
        checkpoint_every_steps=config.checkpoint.every_steps,
        checkpoint_timeout_s=config.checkpoint.timeout_s,
    )


def waste_facts(config: Config, summary: Mapping[str, Any]) -> WasteFacts:
    """Return what the advice on the largest waste depends on.

    Args:
        config: of the run.
        summary: with ``dropped`` and ``trajectories_trained``.
    """
    return WasteFacts(
        engine_kind=config.engine.kind,
        staleness_max=config.staleness.max,
        kv_after_swap=config.engine.kv_after_swap,
        dropped=summary["dropped"],
        groups_used=summary["trajectories_trained"] // config.rollout.group_size,
    )
