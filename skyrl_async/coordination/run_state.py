"""Where a run is: what a checkpoint keeps beside the learner's state, as JSON.

Groups that are buffered or in flight are not in it: after a resume they are gone, and their tasks
have been handed out. So every group that a resumed run trains was played since, and the staleness
bound holds for it as at the start of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from skyrl_async.coordination.ledger import LedgerState
from skyrl_async.types import DropReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The coordinator's part of a checkpoint, between two learner steps.

    Attributes:
        step: learner steps done, skipped ones included.
        policy_version: of the learner.
        tasks: of the task source.
        groups: ``next_group_id``, ``consumed``, ``retired`` and ``dropped`` of the ledger.
        max_staleness: the bound, if the collapse guard has lowered it.
        guard: of the collapse guard, if there is one.
        metrics: totals of the run.
    """

    step: int = 0
    policy_version: int = 0
    tasks: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    max_staleness: int | None = None
    guard: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if step or version are no counts, or there are more versions than steps.
        """
        for name in ("step", "policy_version"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} of a run must be an int >= 0, got {value!r}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the state of :meth:`to_json`.

        Raises:
            ValueError: if it is of another form.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the state of the run is of another form ({error})") from None

    def to_json(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return asdict(self)

    def ledger_state(self) -> LedgerState:
        """Return what the group ledger goes on from: its counts, without groups.

        Raises:
            ValueError: if the state lacks one of them.
        """
        try:
            return LedgerState(
                next_group_id=int(self.groups["next_group_id"]),
                groups=(),
                consumed=int(self.groups["consumed"]),
                retired=int(self.groups["retired"]),
                dropped={DropReason(k): int(n) for k, n in self.groups["dropped"].items()},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state of the groups is of another form ({error!r})") from None


def ledger_counts(state: LedgerState) -> dict[str, Any]:
    """Return what :class:`RunState` keeps of the ledger."""
    return {
        "next_group_id": state.next_group_id,
        "consumed": state.consumed,
        "retired": state.retired,
        "dropped": {reason.value: number for reason, number in state.dropped.items()},
    }
