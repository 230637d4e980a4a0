"""Where a run goes on, what may differ, and what its folder then holds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from skyrl_async.checkpoint import (
    CONFIG,
    LEARNER,
    RUN_STATE,
    CheckpointError,
    begin,
    commit,
    read_manifest,
)
from skyrl_async.config import Config
from skyrl_async.config_loading import ConfigError, dump_config, load_config
from skyrl_async.preflight import describe_run, find_problems
from skyrl_async.resume import FIXED_KEYS, find_checkpoint, find_resume, start_version
from skyrl_async.run_folder import RunFolder, check_run_folder


def config_of(folder: Path | None, resume: str | Path = "auto", *keys: str) -> Config:
    where = [] if folder is None else [f"run.dir={folder}"]
    return load_config(None, [*where, f"run.resume={resume}", *keys])


def add_checkpoint(run: Path, step: int, *keys: str) -> Path:
    partial = begin(run / "checkpoints", step)
    (partial / LEARNER).mkdir()
    (partial / LEARNER / "shard").write_text(f"weights {step}")
    (partial / RUN_STATE).write_text("{}")
    (partial / CONFIG).write_text(dump_config(load_config(None, [f"run.dir={run}", *keys])))
    return commit(partial, step=step, policy_version=step - 1, num_ranks=1)


def add_rows(run: Path, steps: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(lines))


def killed_run(run: Path, *, checkpoints: tuple[int, ...], rows: int = 25) -> None:
    """Leave what a killed run leaves."""
    for step in checkpoints:
        add_checkpoint(run, step)
    add_rows(run, rows)
    begin(run / "checkpoints", 30)
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events").write_text("")
    (run / "weights" / "engine_0").mkdir(parents=True)


def contents(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_is_not_resumed_starts_anew_and_a_folder_with_a_run_names_the_remedy(tmp_path):
    assert find_resume(config_of(tmp_path, "never")) is None
    add_rows(tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds a run already .*run\.resume=auto to go on"):
        RunFolder.create(config_of(tmp_path, "never"))


def test_auto_goes_on_from_the_newest_checkpoint_in_the_folder(tmp_path):
    killed_run(tmp_path, checkpoints=(10, 20))
    with RunFolder.create(config_of(tmp_path)) as folder:
        assert folder.resume is not None
        assert folder.resume.checkpoint == tmp_path / "checkpoints" / "step-000020"
        assert start_version(folder.resume) == 19
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000010", "step-000020"}
    assert not (tmp_path / "weights").exists(), "versions that no learner has any more"
    assert (tmp_path / "tensorboard" / "events").exists()
    assert "goes on from" in (tmp_path / "run.log").read_text()
    assert not (tmp_path / "set_aside").exists()


def test_auto_sets_the_end_of_a_finished_run_aside_once_for_each_time(tmp_path):
    for number in ("001", "002"):
        add_checkpoint(tmp_path, 10 * int(number))
        (tmp_path / "summary.json").write_text(number)
        (tmp_path / "policy").mkdir()
        (tmp_path / "policy" / "model").write_text(number)
        RunFolder.create(config_of(tmp_path)).close()
        aside = tmp_path / "set_aside" / number
        assert contents(aside) == {"summary.json", "policy/model"}
        assert (aside / "summary.json").read_text() == number
        assert not (tmp_path / "summary.json").exists() and not (tmp_path / "policy").exists()
    RunFolder.create(config_of(tmp_path)).close()
    assert {p.name for p in (tmp_path / "set_aside").iterdir()} == {"001", "002"}


def test_auto_passes_over_what_is_not_whole_with_a_warning_and_sets_it_aside(tmp_path, caplog):
    killed_run(tmp_path, checkpoints=(10, 20, 30))
    (tmp_path / "checkpoints" / "step-000020" / RUN_STATE).unlink()
    (tmp_path / "checkpoints" / "step-000030" / LEARNER / "shard").write_text("")
    with caplog.at_level(logging.INFO), RunFolder.create(config_of(tmp_path)) as folder:
        assert folder.resume is not None and folder.resume.manifest.step == 10
    log = (tmp_path / "run.log").read_text()
    for broken in ("step-000020: not a whole checkpoint", "step-000030: not a whole checkpoint"):
        assert broken in log
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and all("passed over" in text for text in warnings)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000010"}
    aside = tmp_path / "set_aside" / "001" / "checkpoints"
    assert {p.name for p in aside.iterdir()} == {"step-000020", "step-000030"}


@pytest.mark.parametrize("damaged", [False, True])
def test_auto_without_a_whole_checkpoint_starts_anew_and_mixes_nothing(tmp_path, damaged):
    killed_run(tmp_path, checkpoints=(10,) if damaged else ())
    if damaged:
        (tmp_path / "checkpoints" / "step-000010" / CONFIG).write_text("")
    with RunFolder.create(config_of(tmp_path)) as folder:
        assert folder.resume is None and start_version(folder.resume) == 0
    left = {"config.yaml", "run.log", "run.lock"}
    aside = {"metrics.jsonl", "tensorboard/events"}
    if damaged:
        aside |= {
            f"checkpoints/step-000010/{name}"
            for name in ("config.yaml", "run.json", "manifest.json", "learner/shard")
        }
    found = contents(tmp_path)
    assert {name for name in found if not name.startswith("set_aside/")} == left
    assert contents(tmp_path / "set_aside" / "001") == aside
    assert "starts anew" in (tmp_path / "run.log").read_text()


def test_auto_in_a_new_folder_starts_there(tmp_path):
    with RunFolder.create(config_of(tmp_path / "new")) as folder:
        assert folder.resume is None
    assert not (tmp_path / "new" / "set_aside").exists()


def test_auto_needs_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.resume=auto: run\.dir is not set"):
        config_of(None)


def test_auto_in_a_folder_that_is_in_use_changes_nothing(tmp_path):
    with RunFolder.create(config_of(tmp_path)):
        add_rows(tmp_path, 3)
        with pytest.raises(ValueError, match="in use by another run"):
            RunFolder.create(config_of(tmp_path))
        assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["checkpoints/step-000010", ""])
def test_a_run_goes_on_in_a_new_folder_from_a_checkpoint_or_from_the_newest_of_a_run(
    tmp_path, name
):
    old, new = tmp_path / "old", tmp_path / "new"
    killed_run(old, checkpoints=(10, 20))
    before = contents(old)
    step = 10 if name else 20
    with RunFolder.create(config_of(new, old / name)) as folder:
        assert folder.resume is not None
        assert folder.resume.checkpoint == new / "checkpoints" / f"step-{step:06d}"
        assert read_manifest(folder.resume.checkpoint).step == step
    assert (new / "metrics.jsonl").read_text() == (old / "metrics.jsonl").read_text()
    assert contents(old) == before, "the old run stays as it was"
    # Killed before its first checkpoint, it goes on from where it started.
    with RunFolder.create(config_of(new, "auto")) as folder:
        assert folder.resume is not None and folder.resume.manifest.step == step


def test_a_checkpoint_outside_a_run_can_be_gone_on_from(tmp_path):
    killed_run(tmp_path / "old", checkpoints=(10,))
    moved = (tmp_path / "old" / "checkpoints" / "step-000010").rename(tmp_path / "kept")
    with RunFolder.create(config_of(tmp_path / "new", moved)) as folder:
        assert folder.resume is not None and folder.resume.manifest.step == 10
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


@pytest.mark.parametrize("resume", ["nowhere", "empty", "broken"])
def test_what_cannot_be_gone_on_from_is_refused_before_anything_is_made(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    broken = add_checkpoint(tmp_path / "run", 10)
    (broken / RUN_STATE).unlink()
    (broken).rename(tmp_path / "broken")
    config = config_of(tmp_path / "new", tmp_path / resume)
    for attempt in (check_run_folder, RunFolder.create):
        with pytest.raises(
            CheckpointError, match=rf"^run\.resume={tmp_path / resume}: "
        ) as refused:
            attempt(config)
        assert "whole checkpoint" in str(refused.value)
    assert not (tmp_path / "new").exists()
    assert any(f"run.resume={tmp_path / resume}" in problem for problem in find_problems(config))


def test_going_on_into_a_folder_that_holds_a_run_is_refused(tmp_path):
    killed_run(tmp_path, checkpoints=(10,))
    with pytest.raises(ValueError, match="holds a run already"):
        RunFolder.create(config_of(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [
        ("seed", "0", "1"),
        ("environment.name", "number_guess", "arithmetic"),
        ("environment.options", "{}", "{high: 12}"),
        ("model.path", "null", "/models/x"),
        ("model.hidden_size", "64", "32"),
        ("model.num_layers", "2", "3"),
        ("model.num_heads", "4", "2"),
        ("critic.kind", "none", "head"),
        ("lora.rank", "0", "4"),
    ],
)
def test_keys_that_cannot_change_are_refused_by_name(tmp_path, key, was, now):
    assert key in FIXED_KEYS
    add_checkpoint(tmp_path, 10)
    needed = ("algorithm.advantage=gae",) if key == "critic.kind" else ()
    config = config_of(tmp_path, "auto", f"{key}={now}", *needed)
    for attempt in (check_run_folder, RunFolder.create):
        with pytest.raises(ValueError) as refused:
            attempt(config)
        message = str(refused.value)
        assert message.startswith("run.resume=auto: cannot go on from ")
        assert f"{key} was {was}, is " in message
        assert "set what it was, or start a new run" in message
    assert not (tmp_path / "set_aside").exists()


def test_all_keys_that_cannot_change_are_named_at_once(tmp_path):
    add_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match=r"seed was 0, is 5; model\.num_layers was 2, is 1"):
        find_resume(config_of(tmp_path, "auto", "seed=5", "model.num_layers=1"))


def test_every_fixed_key_exists():
    from skyrl_async.config_keys import KEYS

    assert set(FIXED_KEYS) <= set(KEYS)


def test_what_may_change_is_logged_and_what_did_not_is_not(tmp_path):
    add_checkpoint(tmp_path, 10)
    keys = ("run.steps=500", "staleness.max=7", "learner.num_ranks=2", "optimizer.learning_rate=1")
    found = find_resume(config_of(tmp_path, "auto", *keys))
    assert found is not None
    assert sorted(found.changes) == [
        "learner.num_ranks=2, it was 1",
        "optimizer.learning_rate=1, it was 0.002",
        "run.steps=500, it was 240",
        "staleness.max=7, it was 2",
    ]
    unchanged = find_resume(config_of(tmp_path))
    assert unchanged is not None and unchanged.changes == ()


def test_sizes_of_the_built_in_policy_mean_nothing_beside_a_path(tmp_path):
    add_checkpoint(tmp_path, 10, "model.path=/models/x")
    keys = ("model.path=/models/x", "model.hidden_size=32")
    found = find_resume(config_of(tmp_path, "auto", *keys))
    assert found is not None
    with pytest.raises(ValueError, match=r"model\.path was /models/x, is /models/y"):
        find_resume(config_of(tmp_path, "auto", "model.path=/models/y"))


def test_a_key_that_the_checkpoint_does_not_know_is_no_difference(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000010"
    partial = begin(tmp_path / "checkpoints", 10)
    (partial / RUN_STATE).write_text("{}")
    (partial / CONFIG).write_text("seed: 0\nold: {key: 1}\n")
    commit(partial, step=10, policy_version=9, num_ranks=1)
    found = find_resume(config_of(tmp_path, "auto", "staleness.max=9"))
    assert found is not None and found.checkpoint == folder and found.changes == ()


def test_checkpoint_of_a_run_or_itself_is_found(tmp_path):
    folder = add_checkpoint(tmp_path, 10)
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == folder
    with pytest.raises(CheckpointError, match="no whole checkpoint there"):
        find_checkpoint(tmp_path / "checkpoints")


def test_a_dry_run_changes_nothing(tmp_path):
    killed_run(tmp_path, checkpoints=(10,))
    (tmp_path / "summary.json").write_text("{}")

    def everything() -> dict[str, Any]:
        return {p.as_posix(): p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    before = everything()
    assert find_problems(config_of(tmp_path)) == []
    assert everything() == before


def test_a_dry_run_says_from_which_step_the_run_goes_on(tmp_path):
    assert "every 100 steps and at the end, the newest 2 kept\n" in describe_run(
        config_of(tmp_path)
    )
    add_checkpoint(tmp_path, 10)
    text = describe_run(config_of(tmp_path, "auto", "checkpoint.every_steps=0"))
    assert f"none; goes on from step 10 in {tmp_path}/checkpoints/step-000010" in text


def test_a_checkpoint_of_another_kind_of_training_is_refused_with_a_remedy(tmp_path):
    partial = begin(tmp_path / "checkpoints", 10)
    (partial / RUN_STATE).write_text('{"epoch": 3}')
    (partial / CONFIG).write_text("seed: 0\n")
    commit(partial, step=10, policy_version=9, num_ranks=1)
    (problem,) = find_problems(config_of(tmp_path))
    assert problem.startswith(
        f"run.resume=auto: {tmp_path}/checkpoints/step-000010 was not written"
    )
    assert "launchers/export.py" in problem
