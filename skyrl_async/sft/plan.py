"""What a fine-tuning will do, worked out before any process is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skyrl_async.checkpoint import read_run_state
from skyrl_async.config import Config
from skyrl_async.config_algorithm import (
    AlgorithmSection,
    CorrectionSection,
    CriticSection,
    KlSection,
)
from skyrl_async.config_distillation import DistillationSection
from skyrl_async.config_optimizer import check_schedule
from skyrl_async.coordination.run_state import RunState
from skyrl_async.resume import Resume, find_resume
from skyrl_async.sft.data import DemonstrationSet, steps_per_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class SftPlan:
    """The same on every rank.

    Attributes:
        given: the configuration as it was given.
        config: of a learner whose every step is one optimizer step, without reinforcement learning.
        steps: in all.
        folder: of the run.
        start: where it goes on.
        resume_from: checkpoint to go on from; None to begin.
    """

    given: Config
    config: Config
    steps: int
    folder: Path
    start: RunState
    resume_from: Path | None

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.start.step


def num_steps(config: Config, data: DemonstrationSet) -> int:
    """Return the number of optimizer steps of all epochs.

    Raises:
        ValueError: if the optimizer's schedule does not fit it.
    """
    sft = config.sft
    steps = sft.epochs * steps_per_epoch(len(data.training), sft.examples_per_step)
    check_schedule(config.optimizer, total_steps=steps)
    return steps


def make_plan(
    config: Config, data: DemonstrationSet, *, folder: Path, resume: Resume | None
) -> SftPlan:
    """Return the plan.

    Args:
        config: as it was given.
        data: to train on.
        folder: of the run.
        resume: from where it goes on, if it does.

    Raises:
        ValueError: if the checkpoint is none of a fine-tuning on these demonstrations, or the
            optimizer's schedule does not fit the number of steps.
    """
    steps = num_steps(config, data)
    return SftPlan(
        given=config,
        config=_learner_config(config, steps=steps),
        steps=steps,
        folder=folder,
        start=RunState() if resume is None else start_of(resume, data),
        resume_from=None if resume is None else resume.checkpoint,
    )


def check_resume(config: Config, data: DemonstrationSet) -> None:
    """Check that ``run.resume``, if it is set, can go on with these demonstrations.

    Raises:
        ValueError: if it cannot, or names no whole checkpoint.
    """
    resume = find_resume(config)
    if resume is not None:
        start_of(resume, data)


def start_of(resume: Resume, data: DemonstrationSet) -> RunState:
    """Return where a fine-tuning goes on.

    Raises:
        ValueError: if the checkpoint is none of a fine-tuning on these demonstrations.
    """
    state = RunState.from_json(read_run_state(resume.checkpoint))
    sha256 = state.tasks.get("demonstrations_sha256")
    if sha256 is None:
        raise ValueError(
            f"run.resume: {resume.checkpoint} is a checkpoint of reinforcement learning; resume it "
            "with launchers/run.py"
        )
    if sha256 != data.sha256:
        raise ValueError(
            f"run.resume: {resume.checkpoint} was trained on other demonstrations than sft.data, "
            "or they are read differently now; give the same file, tokenizer and sft.overlong, or "
            "start anew from the policy with model.path"
        )
    return state


def _learner_config(config: Config, *, steps: int) -> Config:
    """Return the configuration that the learner is built from."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": steps}),
            "learner": config.learner.model_copy(update={"num_minibatches": 1, "num_epochs": 1}),
            "algorithm": AlgorithmSection(),
            "correction": CorrectionSection(),
            "kl": KlSection(),
            "critic": CriticSection(),
            "distillation": DistillationSection(),
        }
    )
