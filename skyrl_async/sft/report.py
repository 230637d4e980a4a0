"""What a fine-tuning leaves to read: metrics of every step, lines on the console, the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skyrl_async.config import Config
from skyrl_async.coordination.run_state import RunState
from skyrl_async.metrics.formatting import duration, number
from skyrl_async.metrics.recorder import Recorder, Sink
from skyrl_async.metrics.sinks import JsonlSink, TensorBoardSink
from skyrl_async.sft.data import DemonstrationSet, steps_per_epoch
from skyrl_async.sft.trainer import StepOutcome

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 5.0
"""Between two lines on the console, besides those of evaluations and of the last step."""
_FINAL_SHARE = 0.1


class SftReport:
    """Collects what rank 0 knows of a fine-tuning.

    Args:
        config: of it.
        data: that it trains on.
        folder: of the run.
        steps: in all.
        start: where it goes on.
        resumed: whether there are metrics of an earlier process.
        show: prints a line.
    """

    def __init__(
        self,
        config: Config,
        data: DemonstrationSet,
        *,
        folder: Path,
        steps: int,
        start: RunState,
        resumed: bool,
        show: Callable[[str], None] = print,
    ) -> None:
        self._data = data
        self._steps = steps
        self._per_epoch = steps_per_epoch(len(data.training), config.sft.examples_per_step)
        self._step = start.step
        self._quiet = config.logging.console == "off"
        self._show = show
        self._started_s = self._line_due_s = time.monotonic()
        before = start.metrics
        self._first_step = start.step
        self._seconds_before = float(before.get("seconds", 0.0))
        self._tokens = int(before.get("tokens_trained", 0))
        self._skipped = int(before.get("skipped_steps", 0))
        self._eval_loss: float | None = before.get("eval_loss")
        self._losses: list[float] = list(before.get("last_losses", ()))
        resume_step = start.step if resumed else None
        self._sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", resume_step=resume_step)]
        if config.logging.tensorboard:
            self._sinks.append(TensorBoardSink(folder / "tensorboard", resume_step=resume_step))
        self._recorder = self._new_recorder()

    def begin(self) -> None:
        """Count seconds and rates from now on: the policy is loaded."""
        self._started_s = self._line_due_s = time.monotonic()
        self._recorder = self._new_recorder()

    def _new_recorder(self) -> Recorder:
        return Recorder(self._sinks, seconds_before=self._seconds_before)

    @property
    def seconds(self) -> float:
        """Of training, those of earlier processes included."""
        return self._seconds_before + time.monotonic() - self._started_s

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took; it is written with the next step."""
        self._recorder.record("checkpoint/save_s", seconds)

    def record(
        self,
        step: int,
        outcome: StepOutcome,
        *,
        learning_rate: float,
        optimizer_steps: int,
        eval_loss: float | None,
    ) -> None:
        """Write the metrics of one step."""
        self._step = step
        self._tokens += outcome.num_tokens
        self._skipped += outcome.grad_norm is None
        keep = max(1, round(_FINAL_SHARE * self._steps))
        self._losses = [*self._losses, outcome.loss][-keep:]
        metrics: dict[str, float] = {
            "policy_version": step,
            "optimizer_steps": optimizer_steps,
            "sft/loss": outcome.loss,
            "sft/epoch": step / self._per_epoch,
            "sft/skipped_steps": self._skipped,
            "policy/entropy": outcome.entropy,
            "policy/lr": learning_rate,
        }
        if outcome.grad_norm is not None:
            metrics["policy/grad_norm"] = outcome.grad_norm
        if eval_loss is not None:
            self._eval_loss = metrics["sft/eval_loss"] = eval_loss
        self._recorder.count("throughput/trained_tokens", outcome.num_tokens)
        written = self._recorder.flush(step, extra=metrics)
        self._print(written, evaluated=eval_loss is not None)

    def state(self) -> RunState:
        """Return what a checkpoint keeps beside weights and optimizer."""
        return RunState(
            step=self._step,
            policy_version=self._step,
            tasks={"demonstrations_sha256": self._data.sha256},
            metrics={
                "seconds": self.seconds,
                "tokens_trained": self._tokens,
                "skipped_steps": self._skipped,
                "eval_loss": self._eval_loss,
                "last_losses": self._losses,
            },
        )

    def summary(self) -> dict[str, Any]:
        """Return what the whole fine-tuning did."""
        losses = self._losses
        return {
            "steps": self._step,
            "epochs": self._step / self._per_epoch,
            "seconds": self.seconds,
            "loss_final": sum(losses) / len(losses) if losses else None,
            "eval_loss_final": self._eval_loss,
            "tokens_trained": self._tokens,
            "skipped_steps": self._skipped,
            "examples": len(self._data.training),
            "examples_held_out": len(self._data.held_out),
            "examples_dropped": self._data.num_dropped,
        }

    def line(self, text: str) -> None:
        """Say what goes on."""
        logger.info("%s", text)
        if not self._quiet:
            self._show(text)

    def close(self) -> None:
        """Close the files."""
        self._recorder.close()

    def _print(self, metrics: Mapping[str, float | None], *, evaluated: bool) -> None:
        now = time.monotonic()
        last = self._step == self._steps
        if self._quiet or not (evaluated or last or now >= self._line_due_s):
            return
        self._line_due_s = now + LINE_INTERVAL_S
        done = self._step - self._first_step
        left = (now - self._started_s) / done * (self._steps - self._step) if done else 0.0
        fields = [
            f"step {self._step}/{self._steps}",
            f"loss {number(metrics.get('sft/loss'))}",
            f"held out {number(self._eval_loss)}",
            f"{number(metrics.get('throughput/trained_tokens_per_s'))} tok/s",
            duration(self.seconds) + ("" if last else f", {duration(left)} left"),
        ]
        self._show("  ".join(fields))
