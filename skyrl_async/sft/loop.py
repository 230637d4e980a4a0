"""The training loop of a fine-tuning, the same on every rank of the learner group."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch

from skyrl_async.config_loading import dump_config
from skyrl_async.coordination.run_state import RunState
from skyrl_async.learner.learner import Learner
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.metrics.ledger import TimeLedger
from skyrl_async.metrics.trace import Tracing, open_tracer
from skyrl_async.runtime.learner_build import build_learner, build_ranks, save_whole_policy
from skyrl_async.sft.checkpoints import SftCheckpoints, restore
from skyrl_async.sft.data import DemonstrationSet, batch_at
from skyrl_async.sft.plan import SftPlan
from skyrl_async.sft.report import SftReport
from skyrl_async.sft.trainer import DemonstrationTrainer, StepOutcome

MAX_SKIPPED_IN_A_ROW = 10
"""So many steps whose loss or gradient is not finite, one after the other, end the training."""


_PARTS = ("load", "other", "data", "train", "step", "evaluate", "checkpoint", "save")
"""Of a rank's time: loading the policy, and in the end saving it; ``data`` chooses and packs."""


class Stop(IntEnum):
    """Why training ends before its last step; the largest of all ranks holds."""

    NO = 0
    TIME = 1
    """``run.max_seconds`` are over; the policy is saved as at the end."""
    SIGNAL = 2
    """Somebody interrupted it; a checkpoint is written, but no policy."""


class SftLoop:
    """One rank: builds the policy, trains it on the demonstrations, writes checkpoints.

    ::

        with SftLoop(plan, data, rank=0, ...) as loop:
            ended = loop.run()

    Args:
        plan: what is done, the same on every rank.
        data: likewise.
        rank: of this process.
        store_address: where rank 0 hosts the group's store; needed with several ranks.
        report: on rank 0.
        stop: asked after every step, on rank 0.
    """

    def __init__(
        self,
        plan: SftPlan,
        data: DemonstrationSet,
        *,
        rank: int = 0,
        store_address: tuple[str, int] | None = None,
        report: SftReport | None = None,
        stop: Callable[[], Stop] = lambda: Stop.NO,
    ) -> None:
        torch.set_num_threads(plan.config.learner.num_threads)
        self._plan = plan
        self._data = data
        self._report = report
        self._stop = stop
        self._step = plan.first_step
        self._saved_step = plan.first_step if plan.resume_from is not None else -1
        self._skipped_in_a_row = 0
        self._ranks = build_ranks(plan.config, rank=rank, store_address=store_address)
        self._tracer = _open_tracer(plan, rank)
        self._lane = self._tracer.lane(role="learner", name=f"rank {rank}")
        self._ledger = TimeLedger("learner", parts=_PARTS, lane=self._lane)
        try:
            self._learner = _build(plan, self._ranks, self._ledger)
            self._trainer = DemonstrationTrainer(self._learner, ledger=self._ledger)
            self._checkpoints = SftCheckpoints(
                plan.folder,
                learner=self._learner,
                ranks=self._ranks,
                config=dump_config(plan.given),
                keep=plan.config.checkpoint.keep,
                timeout_s=plan.config.checkpoint.timeout_s,
            )
        except BaseException:
            self._close()
            raise
        self._ledger.switch_to("other")

    def __enter__(self) -> SftLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._ranks.close()
        self._tracer.close()

    def run(self) -> Stop:
        """Train to the end or until stopped, then write a checkpoint and the policy.

        Raises:
            RuntimeError: if too many steps in a row are not finite.
            OSError: if a checkpoint or the policy cannot be written.
        """
        every = self._plan.config.checkpoint.every_steps
        stop = Stop.NO
        while self._step < self._plan.steps and not stop:
            stop = self._one_step()
            if every and self._step % every == 0:
                self._save()
        if every and self._saved_step != self._step:
            self._save()
        self._end_saving()
        if stop is not Stop.SIGNAL:
            folder = self._plan.folder / "policy"
            with self._ledger.part("save"):
                save_whole_policy(self._learner, self._plan.config, self._ranks, folder)
        return stop

    def _one_step(self) -> Stop:
        outcome = self._train()
        self._check(outcome)
        self._end_saving()
        stop = self._agreed_stop()
        loss = self._held_out_loss() if self._is_evaluated(stop) else None
        if self._report is not None:
            self._report.record(
                self._step,
                outcome,
                learning_rate=self._learner.trainer.learning_rate,
                optimizer_steps=self._learner.optimizer_steps,
                eval_loss=loss,
            )
        return stop

    def _train(self) -> StepOutcome:
        config = self._plan.config
        with self._ledger.part("data"):
            started_s = self._ledger.since_s
            indices = batch_at(
                self._step,
                num_examples=len(self._data.training),
                examples_per_step=config.sft.examples_per_step,
                seed=config.seed,
            )
            outcome = self._trainer.step([self._data.training[i] for i in indices])
        self._step += 1
        args = {"policy_version": self._step, "tokens": outcome.num_tokens}
        self._lane.span("learner step", started_s, self._ledger.since_s, args)
        return outcome

    def _check(self, outcome: StepOutcome) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if outcome.grad_norm is None else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (loss "
                f"{outcome.loss}); lower optimizer.learning_rate or add optimizer.warmup_steps"
            )

    def _agreed_stop(self) -> Stop:
        mine = torch.tensor(int(self._stop()))
        return Stop(int(self._ranks.max_(mine)))

    def _is_evaluated(self, stop: Stop) -> bool:
        if not self._data.held_out or stop is Stop.SIGNAL:
            return False
        every = self._plan.config.evaluation.every_steps
        last = self._step == self._plan.steps or stop is Stop.TIME
        return last or (every > 0 and self._step % every == 0)

    def _held_out_loss(self) -> float:
        with self._ledger.part("evaluate"):
            return self._trainer.mean_loss(self._data.held_out)

    def _save(self) -> None:
        state = RunState(step=self._step, policy_version=self._step)
        if self._report is not None:
            state = self._report.state()
        with self._ledger.part("checkpoint"):
            self._checkpoints.begin(state)
        self._saved_step = self._step

    def _end_saving(self) -> None:
        if not self._checkpoints.is_writing:
            return
        with self._ledger.part("checkpoint"):
            seconds = self._checkpoints.end()
        if seconds is not None and self._report is not None:
            self._report.saved(seconds)


def _open_tracer(plan: SftPlan, rank: int) -> Tracing:
    folder = plan.folder if plan.config.logging.trace else None
    return open_tracer(folder, process=f"learner {rank}")


def _build(plan: SftPlan, ranks: RankGroup, ledger: TimeLedger) -> Learner:
    learner = build_learner(plan.config, ranks, ledger=ledger)
    if plan.resume_from is not None:
        restore(learner, ranks, plan.resume_from)
    return learner
