"""The command line of fine-tuning."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from skyrl_async.config_keys import KEYS, SECTIONS
from skyrl_async.config_sft import KEYS_OF_SFT, is_for_sft
from tests.sft.demonstrations import write_games

LAUNCHER = Path(__file__).resolve().parents[1] / "launchers" / "sft.py"
SMALL = ("model.hidden_size=16", "model.num_heads=2", "sft.epochs=1", "logging.tensorboard=false")


def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sft_launcher_under_test", LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(capsys, *argv: str) -> str:
    assert launcher().main(argv) == 2
    text = capsys.readouterr().err
    assert "Nothing was started." in text
    return text


def test_a_fine_tuning_from_the_command_line(tmp_path):
    games = write_games(tmp_path / "games.jsonl", 100)
    finished = subprocess.run(
        [sys.executable, str(LAUNCHER), *SMALL, f"sft.data={games}", f"run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert "step 3/3" in finished.stdout and str(tmp_path / "run") in finished.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_several_ranks_end_with_their_exit_code_whatever_tearing_down_would_do(tmp_path):
    games = write_games(tmp_path / "games.jsonl", 40)
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: sys.argv[0].endswith('sft.py') and os._exit(99))\n"
    )
    folder = tmp_path / "run"

    def fine_tune(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, str(LAUNCHER), *SMALL, f"sft.data={games}", f"run.dir={folder}"),
                *("learner.num_ranks=2", *flags),
            ],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        )

    assert fine_tune("--dry-run").returncode == 99, "tearing down does change the code"
    finished = fine_tune()
    assert finished.returncode == 0, finished.stderr
    assert f"finished after 2 steps: {folder}" in finished.stdout
    assert (folder / "policy" / "model.safetensors").exists()


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(tmp_path, capsys):
    games = write_games(tmp_path / "games.jsonl", 100)
    folder = tmp_path / "run"
    argv = [*SMALL, f"sft.data={games}", f"run.dir={folder}", "--dry-run"]
    assert launcher().main(argv) == 0
    assert "95 demonstrations to train on, 5 held out, 0 dropped; 3 optimizer" in (
        capsys.readouterr().out
    )
    assert not folder.exists()


def test_what_is_wrong_is_said_before_anything_starts(tmp_path, capsys):
    games = write_games(tmp_path / "games.jsonl", 10)
    assert "sft.data: give a file of JSON lines" in refused(capsys)
    text = refused(capsys, f"sft.data={games}", "staleness.max=0", "rollout.num_actors=2")
    assert "staleness.max has no part in supervised fine-tuning" in text
    assert "rollout.num_actors has no part" in text
    assert "did you mean sft.epochs?" in refused(capsys, f"sft.data={games}", "sft.epoch=2")
    assert "cannot be read" in refused(capsys, f"sft.data={tmp_path / 'missing.jsonl'}")
    text = refused(capsys, f"sft.data={games}", f"model.path={tmp_path / 'missing'}")
    assert "no such folder" in text
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    assert "line 1: has the keys prompt" in refused(capsys, f"sft.data={tmp_path / 'bad.jsonl'}")


def test_every_key_that_is_read_exists_and_is_listed(capsys):
    assert all(key in KEYS or key in SECTIONS for key in KEYS_OF_SFT)
    assert launcher().main(["--keys"]) == 0
    listed = {
        line.partition("=")[0]
        for line in capsys.readouterr().out.splitlines()
        if line and not line.startswith(" ")
    }
    assert listed == {key for key in KEYS if is_for_sft(key)}
    assert {"sft.data", "optimizer.learning_rate", "model.path"} <= listed
    assert not {"staleness.max", "learner.groups_per_step", "run.steps"} & listed


@pytest.mark.parametrize("keys", ["run.name=x", "seed=1"])
def test_the_configuration_can_be_printed(keys, capsys):
    assert launcher().main(["--print-config", "sft.data=a.jsonl", keys]) == 0
    assert "data: a.jsonl" in capsys.readouterr().out
