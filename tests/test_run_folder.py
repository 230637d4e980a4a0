import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.run_folder import RunFolder, check_run_folder, write_atomically

HOLDER = """
import sys
from skyrl_async.config import Config
from skyrl_async.run_folder import RunFolder
folder = RunFolder.create(Config.model_validate({"run": {"dir": sys.argv[1]}}))
print("held", flush=True)
sys.stdin.read()
"""


def config_for(path: Path | str) -> Config:
    return Config.model_validate({"run": {"dir": str(path)}})


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def refused(config: Config, root: Path) -> str:
    """Return why a folder is refused, both before the run and when it is made."""
    with pytest.raises(ValueError) as checked:
        check_run_folder(config, root=root)
    with pytest.raises(ValueError) as created:
        RunFolder.create(config, root=root)
    assert str(checked.value).partition(":")[0] == str(created.value).partition(":")[0]
    return str(created.value)


def test_folder_holds_config_log_lock_and_subfolders_before_anything_runs(tmp_path):
    config = config_for(tmp_path / "deep" / "run")
    with RunFolder.create(config) as folder:
        assert folder.path == tmp_path / "deep" / "run"
        assert load_config(folder.path / "config.yaml", []) == config
        names = {p.name for p in folder.path.iterdir()}
        assert names == {"config.yaml", "run.log", "run.lock", "tensorboard", "checkpoints"}
        assert (folder.path / "run.lock").read_text().startswith(f"{os.getpid()} on ")


def test_without_a_name_of_its_own_each_run_gets_a_new_folder(tmp_path):
    config = Config.model_validate({"run": {"name": "guess"}})
    paths = []
    for _ in range(3):
        with RunFolder.create(config, root=tmp_path / "runs") as folder:
            paths.append(folder.path)
    assert len(set(paths)) == 3
    for path in paths:
        assert path.parent == tmp_path / "runs"
        assert re.fullmatch(r"guess-\d{8}-\d{6}(-\d+)?", path.name)


def test_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder.create(config_for("here")) as folder:
        assert folder.path == tmp_path / "here"


def test_tilde_means_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with RunFolder.create(config_for("~/run")) as folder:
        assert folder.path == tmp_path / "run"


def test_folder_in_use_is_refused_with_the_holder_until_that_ends(tmp_path):
    path = tmp_path / "run"
    with held_by_another_process(path) as process:
        message = refused(config_for(path), tmp_path)
        assert f"in use by another run (process {process.pid} on " in message
        assert "give another run.dir" in message
    check_run_folder(config_for(path))
    RunFolder.create(config_for(path)).close()


def test_folder_in_use_by_this_process_is_refused(tmp_path):
    with RunFolder.create(config_for(tmp_path)):
        assert f"process {os.getpid()}" in refused(config_for(tmp_path), tmp_path)
    RunFolder.create(config_for(tmp_path)).close()


def test_lock_of_a_killed_process_does_not_last(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        with RunFolder.create(config_for(tmp_path)) as folder:
            assert (folder.path / "run.lock").read_text().startswith(f"{os.getpid()} on ")


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "policy"])
def test_folder_that_holds_a_run_is_refused_and_left_as_it_was(tmp_path, name):
    (tmp_path / name).write_text("kept")
    message = refused(config_for(tmp_path), tmp_path)
    assert f"run.dir={tmp_path}: holds a run already ({name})" in message
    assert "give another run.dir" in message
    assert (tmp_path / name).read_text() == "kept"
    assert not (tmp_path / "config.yaml").exists()


def test_unwritable_folders_are_refused_with_path_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    below = refused(config_for(tmp_path / "file" / "run"), tmp_path)
    assert f"run.dir={tmp_path / 'file' / 'run'}: cannot be written (Not a directory" in below
    assert "give a run.dir in a folder that you can write to" in below
    assert "cannot be written (File exists" in refused(config_for(tmp_path / "file"), tmp_path)
    assert "cannot be written" in refused(config_for("/proc/run"), tmp_path)
    assert "cannot be written" in refused(config_for(tmp_path / ("x" * 300)), tmp_path)
    root = refused(Config(), tmp_path / "file")
    assert root.startswith(f"folder {tmp_path / 'file'}: cannot be written")


def test_check_leaves_nothing_behind(tmp_path):
    check_run_folder(config_for(tmp_path / "a" / "b"))
    check_run_folder(Config(), root=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_summary_is_strict_json(tmp_path):
    class Status(StrEnum):
        FINISHED = "finished"

    with RunFolder.create(config_for(tmp_path)) as folder:
        folder.write_summary(
            {
                "status": Status.FINISHED,
                "reward_final": float("nan"),
                "loss": [np.float32("inf"), np.float32(0.5), np.int64(3), True, None],
                "dropped": {Status.FINISHED: 1, 2: "x"},
                "folder": tmp_path,
            }
        )
        text = (folder.path / "summary.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "status": "finished",
        "reward_final": None,
        "loss": [None, 0.5, 3, True, None],
        "dropped": {"finished": 1, "2": "x"},
        "folder": str(tmp_path),
    }


def test_summary_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    with RunFolder.create(config_for(tmp_path)) as folder:
        folder.write_summary({"steps": 1})
        with pytest.raises(TypeError, match="has no JSON form"):
            folder.write_summary({"steps": object()})
        assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 1}


def test_write_is_synced_before_it_is_renamed_and_leaves_no_part(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        assert self.parent == target.parent
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "a.json", "new")
    assert events == ["file", "rename", "folder"]

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no rename")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        write_atomically(tmp_path / "a.json", "newer")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "new"}


def test_log_file_gets_what_is_logged_until_the_folder_is_closed(tmp_path):
    logger = logging.getLogger("skyrl_async.anything")
    handlers_before = list(logging.getLogger().handlers)
    with RunFolder.create(config_for(tmp_path)):
        logger.info("started")
        logging.getLogger("elsewhere").warning("from a library")
        logging.getLogger("elsewhere").info("chatter")
    logger.warning("too late")
    text = (tmp_path / "run.log").read_text()
    assert "INFO skyrl_async.anything: started" in text
    assert "WARNING elsewhere: from a library" in text
    assert "chatter" not in text and "too late" not in text
    assert logging.getLogger().handlers == handlers_before


def test_warnings_still_reach_the_terminal(tmp_path):
    code = (
        "import logging, sys\n"
        "from skyrl_async.config import Config\n"
        "from skyrl_async.run_folder import RunFolder\n"
        "with RunFolder.create(Config.model_validate({'run': {'dir': sys.argv[1]}})):\n"
        "    logging.getLogger('skyrl_async.x').info('quiet')\n"
        "    logging.getLogger('skyrl_async.x').warning('loud')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "loud\n")
