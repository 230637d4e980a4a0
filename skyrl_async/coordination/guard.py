"""The collapse guard: sees training go wrong, and does something about it, in this order.

==============  =====================================================================
action          what happens
==============  =====================================================================
warn            a line in the log
tighten         ``staleness.max`` is halved, down to 0; passed over where it is 0
lower the rate  the learning rates are halved
roll back       the last good weights and optimizer come back, under a *new* policy
                version; groups that are buffered or in flight are dropped
==============  =====================================================================

Version distance goes on meaning staleness: a rollback makes a version, it never goes back to one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from skyrl_async.coordination.ledger import GroupLedger, Outcome

logger = logging.getLogger(__name__)

RATE_FACTOR = 0.5


class GuardAction(IntEnum):
    """What to do; the larger, the harsher."""

    WARN = 1
    TIGHTEN = 2
    LOWER_RATE = 3
    ROLLBACK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """What counts as a sign of collapse; see the configuration's section of the same name."""

    min_ess_fraction: float = 0.1
    max_kl: float = 1.0
    max_mismatch_kl: float = 0.1
    max_clip_fraction: float = 0.5
    min_entropy: float = 0.0
    max_reward_drop: float | None = 0.3
    patience_steps: int = 3
    snapshot_every_steps: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardDecision:
    """What the guard wants.

    Attributes:
        action: None if all is well or it is too early to tell.
        cause: the signs, with value and limit.
        remember: whether the present state is one to come back to.
    """

    action: GuardAction | None = None
    cause: str = ""
    remember: bool = False


def signs(metrics: Mapping[str, float | None], settings: GuardSettings) -> Iterator[str]:
    """Yield what in a step's metrics says that training collapses; absent metrics say nothing.

    A loss or gradient that was not finite is a sign whatever the settings.
    """
    limits = (
        ("offpolicy/ess_fraction", settings.min_ess_fraction, math.inf),
        ("offpolicy/kl_behavior", -math.inf, settings.max_kl),
        ("offpolicy/mismatch_kl", -math.inf, settings.max_mismatch_kl),
        ("offpolicy/clip_fraction", -math.inf, settings.max_clip_fraction),
        ("policy/entropy", settings.min_entropy, math.inf),
        ("learner/skipped_minibatches", -math.inf, 0),
        ("learner/skipped_steps", -math.inf, 0),
    )
    for name, low, high in limits:
        value = metrics.get(name)
        if value is None:
            continue
        if not low <= value <= high:
            yield f"{name} {value:.3g}, limit {low if value < low else high:.3g}"


class CollapseGuard:
    """Decides after every step; knows nothing of how its decisions are carried out.

    ::

        decision = guard.observe(metrics_of_the_step)

    A sign must be there for ``patience_steps`` in a row; then comes the next action of the list,
    and the count begins anew. After a rollback the list goes on with ``tighten``; ten times as many
    healthy steps as ``patience_steps`` begin it anew.

    Args:
        settings: limits.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._bad_steps = 0
        self._healthy_steps = 0
        self._level = 0
        self._best_reward = -math.inf
        self._reward: float | None = None

    @property
    def steps_to_rollback(self) -> int:
        """Steps with a sign after which a rollback has come, whatever was done before."""
        return GuardAction.ROLLBACK * self._settings.patience_steps

    def observe(
        self, metrics: Mapping[str, float | None], *, can_tighten: bool = True
    ) -> GuardDecision:
        """Return what to do after a step with these metrics.

        Args:
            metrics: of the step.
            can_tighten: whether ``staleness.max`` is above 0; otherwise that action is passed over.
        """
        found = [*signs(metrics, self._settings), *self._reward_signs(metrics.get("reward/mean"))]
        patience = self._settings.patience_steps
        if not found:
            self._bad_steps = 0
            self._healthy_steps += 1
            if self._healthy_steps >= 10 * patience:
                self._level = 0
            every = self._settings.snapshot_every_steps
            return GuardDecision(remember=self._healthy_steps % every == 0)
        self._healthy_steps = 0
        self._bad_steps += 1
        if self._bad_steps < patience:
            return GuardDecision()
        self._bad_steps = 0
        self._level += 1
        if self._level == GuardAction.TIGHTEN and not can_tighten:
            self._level += 1
        action = GuardAction(self._level)
        if action is GuardAction.ROLLBACK:
            # What made the old weights collapse would do it again: tighten and lower further.
            self._level = GuardAction.WARN
            self._reward = None
        return GuardDecision(action=action, cause="; ".join(found))

    def state(self) -> dict[str, float | int | None]:
        """Return what :meth:`restore` needs to go on from here; it can be written as JSON."""
        best = self._best_reward
        return {
            "bad_steps": self._bad_steps,
            "healthy_steps": self._healthy_steps,
            "level": self._level,
            "best_reward": best if math.isfinite(best) else None,
            "reward": self._reward,
        }

    def restore(self, state: Mapping[str, float | int | None]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            ValueError: if the state is of another form.
        """
        try:
            self._bad_steps, self._healthy_steps, self._level = (
                int(state[name] or 0) for name in ("bad_steps", "healthy_steps", "level")
            )
            best = state["best_reward"]
            self._best_reward = -math.inf if best is None else float(best)
            self._reward = state["reward"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the saved collapse guard is of another form ({error!r})") from None

    def _reward_signs(self, reward: float | None) -> Iterator[str]:
        """Compare a running mean of the reward with the best that it ever was."""
        drop = self._settings.max_reward_drop
        if reward is None or drop is None:
            return
        self._reward = reward if self._reward is None else 0.7 * self._reward + 0.3 * reward
        if self._best_reward - self._reward > drop:
            best = self._best_reward
            yield f"reward/mean {self._reward:.3g}, more than {drop:.3g} below its best {best:.3g}"
        self._best_reward = max(self._best_reward, self._reward)


class RevertibleLearner(Protocol):
    """What the guard needs of the learner group."""

    async def remember(self) -> None:
        """Keep a copy of weights and optimizer, in place of an older one."""
        ...

    async def roll_back(self) -> int:
        """Go back to the copy under a new policy version, publish it, and return the version."""
        ...

    async def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate of all later steps."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOutcome:
    """What an action changed.

    Attributes:
        action: that was taken, if any.
        policy_version: of the learner, if a rollback made one.
        ledger: groups that left, slots that are free, if any.
    """

    action: GuardAction | None = None
    policy_version: int | None = None
    ledger: Outcome | None = None


class GuardedTraining:
    """Carries out what the guard decides.

    Args:
        guard: decides.
        groups: admission and replay buffer.
        learner: all ranks.
        max_staleness: the bound that the guard of an earlier part of the run has set.

    Attributes:
        max_staleness: the bound that the guard has set, None if it has set none.
    """

    def __init__(
        self,
        guard: CollapseGuard,
        *,
        groups: GroupLedger,
        learner: RevertibleLearner,
        max_staleness: int | None = None,
    ) -> None:
        self._guard = guard
        self._groups = groups
        self._learner = learner
        self.max_staleness = max_staleness
        if max_staleness is not None and max_staleness < groups.max_staleness:
            groups.tighten(max_staleness)

    async def start(self) -> None:
        """Keep the initial weights, to which a rollback can always go."""
        await self._learner.remember()

    def state(self) -> dict[str, float | int | None]:
        """Return what :meth:`CollapseGuard.restore` needs; the weights kept are not in it."""
        return self._guard.state()

    async def after_step(self, step: int, metrics: Mapping[str, float | None]) -> GuardOutcome:
        """Look at a finished step, and act."""
        decision = self._guard.observe(metrics, can_tighten=self._groups.max_staleness > 0)
        if decision.remember:
            await self._learner.remember()
        if decision.action is None:
            return GuardOutcome()
        name = decision.action.name.lower().replace("_", " ")
        logger.warning("step %d: collapse guard: %s, because of %s", step, name, decision.cause)
        return await self._act(decision.action)

    async def _act(self, action: GuardAction) -> GuardOutcome:
        if action is GuardAction.TIGHTEN:
            bound = self._groups.max_staleness // 2
            logger.warning("collapse guard: staleness.max is now %d", bound)
            self._groups.tighten(bound)
            self.max_staleness = bound
        elif action is GuardAction.LOWER_RATE:
            await self._learner.scale_rate(RATE_FACTOR)
        elif action is GuardAction.ROLLBACK:
            version = await self._learner.roll_back()
            logger.warning("collapse guard: the last good weights are policy version %d", version)
            outcome = self._groups.drop_all()
            return GuardOutcome(action=action, policy_version=version, ledger=outcome)
        return GuardOutcome(action=action)
