"""Whole fine-tunings: they learn, resume exactly, stop when told, and leave what they promise."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from skyrl_async.checkpoint import checkpoints_in
from skyrl_async.config_loading import load_config
from skyrl_async.run import evaluate
from skyrl_async.run_folder import RunFolder
from skyrl_async.sft.data import load_demonstration_set
from skyrl_async.sft.loop import SftLoop
from skyrl_async.sft.run import train
from skyrl_async.sft.trainer import DemonstrationTrainer
from skyrl_async.timeline.__main__ import main as draw_timeline
from skyrl_async.timeline.reader import TraceLane, read_trace
from skyrl_async.timeline.shares import role_shares
from tests.sft.demonstrations import write_games

SMALL = (
    *("model.hidden_size=16", "model.num_heads=2", "sft.examples_per_step=8", "sft.epochs=2"),
    *("sft.eval_fraction=0.2", "evaluation.every_steps=3", "logging.tensorboard=false"),
)


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    return write_games(tmp_path_factory.mktemp("games") / "games.jsonl", 40)


def fine_tune(folder: Path, games: Path, *overrides: str) -> dict[str, Any]:
    """Fine-tune in this process; return the summary, with the exit code as ``exit_code``."""
    config = load_config(None, [*SMALL, f"sft.data={games}", f"run.dir={folder}", *overrides])
    data = load_demonstration_set(config)
    with RunFolder.create(config) as run_folder:
        code = train(config, run_folder, data)
    return {**json.loads((folder / "summary.json").read_text()), "exit_code": code}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def interrupting(monkeypatch, *, at_step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a step."""
    step = DemonstrationTrainer.step
    calls: list[int] = []

    def interrupted(self, sequences):
        calls.append(1)
        if len(calls) == at_step:
            signal.raise_signal(number)
        return step(self, sequences)

    monkeypatch.setattr(DemonstrationTrainer, "step", interrupted)


def test_it_learns_a_perfect_player_and_the_policy_plays_like_it(tmp_path):
    games = write_games(tmp_path / "games.jsonl", 200)
    overrides = (
        *("model.hidden_size=64", "model.num_heads=4", "sft.epochs=6"),
        *("sft.examples_per_step=32", "sft.eval_fraction=0.05", "optimizer.schedule=cosine"),
    )
    summary = fine_tune(tmp_path / "run", games, *overrides)
    assert (summary["status"], summary["exit_code"]) == ("finished", 0)

    def reward(*policy: str) -> float:
        keys = ("runtime=local", "environment.in_process=true", "evaluation.num_tasks=60")
        config = load_config(None, [*overrides, *keys, "sampling.max_tokens=2", *policy])
        return asyncio.run(evaluate(config)).mean_reward

    assert reward() < 0.3
    assert reward(f"model.path={tmp_path / 'run' / 'policy'}") > 0.95


def test_a_fine_tuning_leaves_what_it_promises(tmp_path, games):
    folder = tmp_path / "run"
    summary = fine_tune(folder, games, "logging.tensorboard=true", "seed=3")
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "sft/eval_loss" in row] == [3, 6, 8]
    assert rows[-1]["sft/epoch"] == 2.0
    assert rows[-1]["optimizer_steps"] == 8
    for name in ("sft/loss", "policy/entropy", "policy/grad_norm", "policy/lr", "time_s"):
        assert all(row[name] >= 0 for row in rows), name
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    assert summary["steps"] == 8 and summary["epochs"] == 2.0
    assert (summary["examples"], summary["examples_held_out"]) == (32, 8)
    assert summary["loss_final"] == rows[-1]["sft/loss"]
    assert summary["eval_loss_final"] == rows[-1]["sft/eval_loss"]
    assert summary["tokens_trained"] == 2 * sum(
        int(s.loss_mask.sum())
        for s in load_demonstration_set(
            load_config(None, [*SMALL, f"sft.data={games}", "seed=3"])
        ).training
    )
    assert (summary["seed"], summary["num_ranks"], summary["resumed_from_step"]) == (3, 1, None)
    assert [p.name for p in checkpoints_in(folder / "checkpoints")] == ["step-000008"]
    assert list((folder / "tensorboard").iterdir())
    assert yaml.safe_load((folder / "config.yaml").read_text())["sft"]["epochs"] == 2
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in (folder / "policy").iterdir()
    }


def spans_of(lane: TraceLane, *names: str) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in lane.spans if span.name in names]


def inside(inner: list[tuple[float, float]], outer: list[tuple[float, float]]) -> bool:
    return all(any(a <= start and end <= b for a, b in outer) for start, end in inner)


def test_the_timeline_has_every_step_of_a_fine_tuning(tmp_path, games, capsys):
    folder = tmp_path / "run"
    fine_tune(folder, games, "checkpoint.every_steps=4")
    (lane,) = read_trace(folder).lanes
    assert (lane.process, lane.role, lane.name) == ("learner 0", "learner", "rank 0")
    steps = [span for span in lane.spans if span.name == "learner step"]
    assert [span.args["policy_version"] for span in steps] == list(range(1, 9))
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(int(span.args["tokens"]) for span in steps) == summary["tokens_trained"]
    around = spans_of(lane, "learner step")
    for name in ("data", "train", "step"):
        assert len(spans_of(lane, name)) >= 8 and inside(spans_of(lane, name), around), name
    passes = spans_of(lane, "forward", "backward")
    assert len(passes) == 16 and inside(passes, spans_of(lane, "train"))
    # Held out after steps 3, 6 and 8; written after 4 and 8, each with its begin and its end.
    assert len(spans_of(lane, "evaluate")) == 3 and len(spans_of(lane, "checkpoint")) == 4
    (load,), (save,) = spans_of(lane, "load"), spans_of(lane, "save")
    assert load[1] <= around[0][0] and around[-1][1] <= save[0]
    assert sum(role_shares(read_trace(folder))["learner"].values()) == pytest.approx(1.0)
    assert draw_timeline([str(folder)]) == 0 and "learner" in capsys.readouterr().out
    assert (folder / "timeline.html").is_file() and (folder / "timeline.json").is_file()
    # A longer one goes on in the same lane.
    fine_tune(folder, games, "run.resume=auto", "sft.epochs=3")
    (lane,) = read_trace(folder).lanes
    assert len(spans_of(lane, "learner step")) == 12 and len(spans_of(lane, "load")) == 2


def test_without_tracing_there_is_no_timeline(tmp_path, games):
    fine_tune(tmp_path / "run", games, "logging.trace=false", "sft.epochs=1")
    assert not (tmp_path / "run" / "trace").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_goes_on_to_exactly_the_same_weights(
    tmp_path, games, monkeypatch, number
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    schedule = ("optimizer.schedule=linear", "optimizer.warmup_steps=2", "sft.examples_per_step=2")
    fine_tune(whole, games, *schedule)
    with monkeypatch.context() as patch:
        # Two of the four steps that loss_final is the mean of come before.
        interrupting(patch, at_step=31, number=number)
        summary = fine_tune(cut, games, *schedule)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 128 + number)
    assert summary["steps"] == 31 and not (cut / "policy").exists()
    summary = fine_tune(cut, games, *schedule, "run.resume=auto")
    assert (summary["status"], summary["resumed_from_step"]) == ("finished", 31)
    assert same(weights_of(whole), weights_of(cut))
    assert [r["step"] for r in rows_of(cut)] == list(range(1, 33))
    for a, b in zip(rows_of(whole), rows_of(cut), strict=True):
        assert a["sft/loss"] == b["sft/loss"] and a["policy/lr"] == b["policy/lr"]
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (whole, cut))
    for name in ("tokens_trained", "loss_final", "eval_loss_final", "epochs"):
        assert ours[name] == theirs[name], name


def test_a_second_interrupt_ends_at_once(tmp_path, games, monkeypatch):
    interrupting(monkeypatch, at_step=2)
    first = DemonstrationTrainer.step

    def again(self, sequences):
        outcome = first(self, sequences)
        if self._learner.policy_version == 2:
            signal.raise_signal(signal.SIGINT)
        return outcome

    monkeypatch.setattr(DemonstrationTrainer, "step", again)
    summary = fine_tune(tmp_path / "run", games)
    assert (summary["status"], summary["exit_code"], summary["steps"]) == ("interrupted", 130, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_run_and_other_demonstrations_cannot_be_gone_on_with(tmp_path, games):
    folder = tmp_path / "run"
    fine_tune(folder, games)
    other = write_games(tmp_path / "other.jsonl", 39)
    with pytest.raises(ValueError, match="trained on other demonstrations"):
        fine_tune(tmp_path / "new", other, f"run.resume={folder}")
    (checkpoint,) = checkpoints_in(folder / "checkpoints")
    state = json.loads((checkpoint / "run.json").read_text())
    assert state["tasks"]["demonstrations_sha256"]


def test_one_that_goes_on_can_be_longer_and_in_another_folder(tmp_path, games):
    first, second = tmp_path / "first", tmp_path / "second"
    fine_tune(first, games)
    summary = fine_tune(second, games, f"run.resume={first}", "sft.epochs=3")
    assert (summary["steps"], summary["resumed_from_step"]) == (12, 8)
    assert [r["step"] for r in rows_of(second)] == list(range(1, 13))
    assert not same(weights_of(first), weights_of(second))


def test_checkpoints_come_every_few_steps_and_once_at_the_end(tmp_path, games):
    folder = tmp_path / "run"
    fine_tune(folder, games, "checkpoint.every_steps=4", "checkpoint.keep=5")
    assert [p.name[-1] for p in checkpoints_in(folder / "checkpoints")] == ["4", "8"]
    assert all(row["checkpoint/save_s"] > 0 for row in rows_of(folder) if row["step"] == 5)
    fine_tune(tmp_path / "none", games, "checkpoint.every_steps=0")
    assert checkpoints_in(tmp_path / "none" / "checkpoints") == []


def test_the_seed_decides_the_order(tmp_path, games):
    fine_tune(tmp_path / "start", games, "sft.epochs=1")
    policy = f"model.path={tmp_path / 'start' / 'policy'}"
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        fine_tune(folder, games, policy, f"seed={seed}", "sft.eval_fraction=0")
        losses.append([row["sft/loss"] for row in rows_of(folder)])
    assert losses[0] == losses[1] != losses[2]


def test_time_ends_it_with_a_policy(tmp_path, games):
    summary = fine_tune(tmp_path / "run", games, "run.max_seconds=0.001", "sft.epochs=50")
    assert (summary["status"], summary["steps"]) == ("finished", 1)
    assert summary["eval_loss_final"] is not None
    assert weights_of(tmp_path / "run")


def test_losses_that_stay_nonfinite_end_it(tmp_path, games, monkeypatch):
    step = DemonstrationTrainer.step

    def broken(self, sequences):
        with torch.no_grad():
            self._learner.model.get_output_embeddings().weight[0, 0] = torch.nan
        return step(self, sequences)

    monkeypatch.setattr(DemonstrationTrainer, "step", broken)
    summary = fine_tune(tmp_path / "run", games, "sft.epochs=20")
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert "10 steps in a row" in summary["error"] and summary["skipped_steps"] == 9


def test_a_checkpoint_that_cannot_be_written_ends_it_and_keeps_the_one_before(
    tmp_path, games, monkeypatch
):
    folder = tmp_path / "run"
    step = DemonstrationTrainer.step

    def blocking(self, sequences):
        outcome = step(self, sequences)
        if self._learner.policy_version == 5:
            root = folder / "checkpoints"
            root.rename(folder / "moved")
            root.write_text("in the way")
        return outcome

    monkeypatch.setattr(DemonstrationTrainer, "step", blocking)
    summary = fine_tune(folder, games, "checkpoint.every_steps=3")
    assert summary["status"] == "failed"
    assert [p.name for p in checkpoints_in(folder / "moved")] == ["step-000003"]


def test_low_rank_adapters_are_trained_and_exported_merged(tmp_path, games):
    first, second = tmp_path / "first", tmp_path / "second"
    fine_tune(first, games)
    summary = fine_tune(
        second,
        games,
        "lora.rank=4",
        f"model.path={first / 'policy'}",
        "optimizer.learning_rate=0.01",
    )
    assert summary["status"] == "finished"
    before, after = weights_of(first), weights_of(second)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)


@pytest.mark.slow
def test_two_ranks_leave_the_policy_of_one(tmp_path, games):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    fine_tune(alone, games)
    summary = fine_tune(shared, games, "learner.num_ranks=2", "checkpoint.every_steps=3")
    assert (summary["status"], summary["num_ranks"], summary["steps"]) == ("finished", 2, 8)
    ours, theirs = weights_of(shared), weights_of(alone)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    for a, b in zip(rows_of(alone), rows_of(shared), strict=True):
        assert a["sft/loss"] == pytest.approx(b["sft/loss"], rel=1e-4)
    assert [
        (lane.process, lane.name, len(spans_of(lane, "learner step")))
        for lane in read_trace(shared).lanes
    ] == [("learner 0", "rank 0", 8), ("learner 1", "rank 1", 8)]
    # What two ranks wrote, one goes on with.
    again = fine_tune(tmp_path / "again", games, f"run.resume={shared}", "sft.epochs=3")
    assert (again["status"], again["resumed_from_step"], again["steps"]) == ("finished", 8, 12)


def on_other_ranks(number: signal.Signals) -> None:
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, number)


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path, games, monkeypatch):
    step = SftLoop._one_step

    def kill_others(self):
        on_other_ranks(signal.SIGKILL)
        return step(self)

    monkeypatch.setattr(SftLoop, "_one_step", kill_others)
    summary = fine_tune(tmp_path / "run", games, "learner.num_ranks=2", "learner.step_timeout_s=60")
    assert summary["status"] == "failed"
    assert "rank 1 (exit code -9) ended early" in summary["error"]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_outlive_rank_0(tmp_path, games, monkeypatch):
    def fail(self):
        on_other_ranks(signal.SIGSTOP)
        raise RuntimeError("rank 0 has enough")

    monkeypatch.setattr(SftLoop, "_one_step", fail)
    summary = fine_tune(tmp_path / "run", games, "learner.num_ranks=2")
    assert (summary["status"], summary["error"]) == ("failed", "rank 0 has enough")
    assert not multiprocessing.active_children()
