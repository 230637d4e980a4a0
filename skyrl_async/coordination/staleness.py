"""The arithmetic of staleness: pure functions, and the rule that the replay buffer applies.

Symbols: ``B`` groups per learner step, ``K`` largest staleness of a trained token, ``M`` learner
steps that may use one group. Definitions and proofs are in ``STALENESS.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from skyrl_async.types import AnyGroup, Trajectory, TrajectoryHeader

RuleName = Literal["mask", "drop", "pace"]


def staleness(train_version: int, *, token_version: int) -> int:
    """Return how many versions old a token is in the step that starts at ``train_version``.

    Raises:
        RuntimeError: if the token is newer than the step that trains it.
    """
    if token_version > train_version:
        raise RuntimeError(
            f"a token of version {token_version} cannot be trained by the step that starts at "
            f"version {train_version}: no engine may have weights that the learner has not made"
        )
    return train_version - token_version


def min_trainable_version(train_version: int, *, max_staleness: int) -> int:
    """Return the oldest version whose tokens the step at ``train_version`` may train."""
    return max(0, train_version - max_staleness)


def max_admitted(*, groups_per_step: int, max_staleness: int, max_times_sampled: int) -> int:
    """Return how many groups may be admitted and not released: ``max(B, (K + 1) B // M)``."""
    return max(groups_per_step, (max_staleness + 1) * groups_per_step // max_times_sampled)


def pace_allows(
    left_over: Mapping[int, int], *, train_version: int, max_staleness: int, groups_per_step: int
) -> bool:
    """Return whether the groups that a batch leaves over can all be trained in time.

    The deadline of a group is its oldest version plus ``K``. After the step at ``train_version``,
    ``j`` further steps train ``j * B`` groups before a deadline of ``train_version + j`` has
    passed. So the batch may be taken if at most ``j * B`` groups left over have a deadline of at
    most ``train_version + j``, for every ``j`` from 0 (none may expire at once) to ``K``.

    Args:
        left_over: number of groups, buffered or in flight, by oldest policy version (for a group in
            flight a lower bound of it).
        train_version: at which the step that trains the batch starts.
        max_staleness: ``K``.
        groups_per_step: ``B``.
    """
    return all(
        sum(count for version, count in left_over.items() if version + max_staleness <= deadline)
        <= (deadline - train_version) * groups_per_step
        for deadline in range(train_version, train_version + max_staleness + 1)
    )


def count_loss_tokens(
    item: AnyGroup | Trajectory | TrajectoryHeader, *, min_trainable_version: int
) -> int:
    """Return how many sampled tokens are at least as new as the cut-off."""
    if item.min_policy_version >= min_trainable_version:
        return item.num_generated_tokens
    if item.max_policy_version < min_trainable_version:
        return 0
    if isinstance(item, Trajectory | TrajectoryHeader):
        return item.num_tokens_since(min_trainable_version)
    return sum(
        count_loss_tokens(t, min_trainable_version=min_trainable_version) for t in item.trajectories
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessCost:
    """What the bound cost, in generated tokens and in trajectories.

    Every group is counted once, at its first use or when it is dropped as stale; ``masked_tokens``
    and ``trained_tokens`` count every use.

    Attributes:
        lost_tokens: that never enter a loss, because they were too old.
        kept_tokens: that did.
        lost_trajectories: without any token in a loss.
        lost_trajectory_tokens: generated in those.
        kept_trajectories: with a token in a loss.
        kept_trajectory_tokens: generated in those.
        masked_tokens: of the batches trained, outside the loss.
        trained_tokens: of the batches trained, in the loss.
    """

    lost_tokens: int = 0
    kept_tokens: int = 0
    lost_trajectories: int = 0
    lost_trajectory_tokens: int = 0
    kept_trajectories: int = 0
    kept_trajectory_tokens: int = 0
    masked_tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: StalenessCost) -> StalenessCost:
        return StalenessCost(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics below ``staleness/``; those without a denominator are left out."""
        out = {}
        if generated := self.lost_tokens + self.kept_tokens:
            out["lost_generation_fraction"] = self.lost_tokens / generated
        if in_batches := self.masked_tokens + self.trained_tokens:
            out["masked_fraction"] = self.masked_tokens / in_batches
        if self.lost_trajectories and self.kept_trajectories:
            lost_length = self.lost_trajectory_tokens / self.lost_trajectories
            kept_length = self.kept_trajectory_tokens / self.kept_trajectories
            out["lost_over_kept_length"] = lost_length / kept_length
        return out


def first_use_cost(group: AnyGroup, *, min_trainable_version: int | None) -> StalenessCost:
    """Return what the bound costs at the first use of a group.

    Later cut-offs are never lower, so a token that misses the first use is lost for good.

    Args:
        group: that is used for the first time, or dropped as stale.
        min_trainable_version: its cut-off; None if the group is dropped.
    """
    if min_trainable_version is not None and group.min_policy_version >= min_trainable_version:
        return StalenessCost(
            kept_tokens=group.num_generated_tokens,
            kept_trajectories=len(group.trajectories),
            kept_trajectory_tokens=group.num_generated_tokens,
        )
    kept_tokens = lost_trajectories = lost_trajectory_tokens = 0
    for trajectory in group.trajectories:
        trained = 0
        if min_trainable_version is not None:
            trained = count_loss_tokens(trajectory, min_trainable_version=min_trainable_version)
        kept_tokens += trained
        if not trained:
            lost_trajectories += 1
            lost_trajectory_tokens += trajectory.num_generated_tokens
    return StalenessCost(
        lost_tokens=group.num_generated_tokens - kept_tokens,
        kept_tokens=kept_tokens,
        lost_trajectories=lost_trajectories,
        lost_trajectory_tokens=lost_trajectory_tokens,
        kept_trajectories=len(group.trajectories) - lost_trajectories,
        kept_trajectory_tokens=group.num_generated_tokens - lost_trajectory_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessRule:
    """What happens at the bound, in the form that the replay buffer asks for.

    Attributes:
        name: ``mask``: old tokens leave the loss. ``drop``: a group with any old token leaves.
            ``pace``: as drop, but a batch is only taken when no other group will have to leave.
        max_staleness: ``K``.
        groups_per_step: ``B``.

    Raises:
        ValueError: on an unknown name, ``K < 0`` or ``B < 1``.
    """

    name: RuleName
    max_staleness: int
    groups_per_step: int

    def __post_init__(self) -> None:
        if self.name not in ("mask", "drop", "pace"):
            raise ValueError(f"staleness.rule must be mask, drop or pace, got {self.name!r}")
        if self.max_staleness < 0 or self.groups_per_step < 1:
            raise ValueError(
                f"staleness.max must be >= 0 and learner.groups_per_step >= 1, "
                f"got {self.max_staleness} and {self.groups_per_step}"
            )

    @property
    def needs_order(self) -> bool:
        """Whether groups must be used once, oldest first, in the order in which they are leased."""
        return self.name == "pace"

    def min_trainable_version(self, train_version: int) -> int:
        """Return the cut-off: older tokens stay out of the step at ``train_version``."""
        return min_trainable_version(train_version, max_staleness=self.max_staleness)

    def deadline(self, group: AnyGroup) -> int:
        """Return the newest version whose step may still train the group.

        Under ``mask`` its newest token counts, otherwise its oldest.
        """
        mask = self.name == "mask"
        version = group.max_policy_version if mask else group.min_policy_version
        return version + self.max_staleness

    def allows(self, left_over: Mapping[int, int], *, train_version: int) -> bool:
        """Return whether a batch may be taken that leaves these groups over.

        Args:
            left_over: number of groups, buffered or in flight, by (a lower bound of the) oldest
                policy version.
            train_version: at which the step that trains the batch starts.
        """
        return self.name != "pace" or pace_allows(
            left_over,
            train_version=train_version,
            max_staleness=self.max_staleness,
            groups_per_step=self.groups_per_step,
        )
