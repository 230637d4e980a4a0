"""What one sees of a run while it goes on, and what is kept for later."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skyrl_async.config_section import Section, Texts


class LoggingSection(Section):
    """What one sees."""

    console: Literal["auto", "live", "plain", "off"] = "auto"
    """auto: a live table on a terminal, plain lines otherwise and under CI."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    trace: bool = True
    """Write the timeline of every process: python -m skyrl_async.timeline RUN."""
    trace_slots: int = Field(default=16, ge=0)
    """Slots of each rollout actor that the timeline shows; idle shares count all of them."""
    report: bool = True
    """Write report.html when the run ends."""
    samples_every_steps: int = Field(default=20, ge=0)
    """Learner steps between trajectories kept in samples.jsonl, for the report; 0 keeps none."""
    samples_per_step: int = Field(default=4, ge=1, le=64)
    """Trajectories kept of such a step."""
    trackers: Texts = ()
    """Experiment trackers that get the metrics too: wandb, mlflow, trackio; each is an extra."""
    project: str = Field(default="skyrl_async", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run's project, or experiment, at the trackers; the run is named as its folder."""
    tracker_timeout_s: float = Field(default=30, ge=0)
    """Time that trackers have at the end of the run to take what is left."""
