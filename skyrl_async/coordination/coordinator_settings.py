"""The limits of a run, as the coordinator takes them."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_async.coordination.evaluation import EvaluationSettings
from skyrl_async.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """When to stop, and how long to wait.

    Attributes:
        steps: learner steps.
        max_seconds: of training; None for no limit.
        stop_at_eval_reward: an evaluation that reaches it ends the run; None for never.
        evaluation_every_steps: learner steps between evaluations; 0 evaluates only at the end.
        evaluation_tasks: held-out tasks; none never evaluates.
        max_groups_per_actor: in flight at one actor.
        poll_wait_s: an actor reports at least this often.
        answer_timeout_s: an actor that does not answer a call for this long has failed.
        step_timeout_s: a learner step that takes longer has failed.
        stall_timeout_s: without a batch for this long, the run has failed.
        evaluation_timeout_s: an evaluation that takes longer has failed.
        max_failed_groups: consecutive groups without one that succeeds, after which the run fails.
        checkpoint_every_steps: learner steps between checkpoints.
        checkpoint_timeout_s: a checkpoint that takes longer has failed.
        publishes_late: whether the learner holds versions back, so that the last one is live only
            when it is asked for.
    """

    steps: int
    max_seconds: float | None = None
    stop_at_eval_reward: float | None = None
    evaluation_every_steps: int = 0
    evaluation_tasks: tuple[Task, ...] = ()
    max_groups_per_actor: int = 1024
    poll_wait_s: float = 1.0
    answer_timeout_s: float = 60.0
    step_timeout_s: float = 600.0
    stall_timeout_s: float = 700.0
    evaluation_timeout_s: float = 300.0
    max_failed_groups: int = 200
    checkpoint_every_steps: int = 100
    checkpoint_timeout_s: float = 600.0
    publishes_late: bool = False

    @property
    def evaluation(self) -> EvaluationSettings:
        """What of this concerns evaluations."""
        return EvaluationSettings(
            tasks=self.evaluation_tasks,
            every_steps=self.evaluation_every_steps,
            timeout_s=self.evaluation_timeout_s,
            target=self.stop_at_eval_reward,
        )
