"""The trackers' own libraries, without network; skipped where one is not installed."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_async.metrics.trackers import end_trackers, start_trackers

pytestmark = pytest.mark.peers

CONFIG = {"seed": 3, "model": {"hidden_size": 64, "path": None}, "engine": {"urls": ()}}
WAIT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


def track(name, folder, steps, *, status="finished"):
    """Record steps in one process's worth of a run: reward/mean is a tenth of the step."""
    sinks = start_trackers([name], project="proj", folder=folder, config=CONFIG)
    for step in steps:
        sinks[0].write(
            step,
            metrics={"step": step, "reward/mean": step / 10, "policy/grad_norm": None},
            histograms={"staleness/histogram": {0: 6, 2: step}},
        )
    assert end_trackers(sinks, status=status, timeout_s=WAIT_S) == {}


def log_records(data):
    """Yield the records of a LevelDB log, which is what the library writes, after its own header.

    A file is blocks of 32 KiB; a fragment is checksum (4 bytes), length (2), type (1: whole,
    2: first, 3: middle, 4: last), bytes.
    """
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        place += 7
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(folder):
    """Return (run id, config, rows, exit code) of an offline run's folder."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("run-*.wandb")
    config, rows, exit_code, run_id = {}, [], None, None
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            rows.append(
                {
                    (i.key or ".".join(i.nested_key)): json.loads(i.value_json)
                    for i in record.history.item
                }
            )
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return run_id, config, rows, exit_code


def test_wandb_offline_run_has_rows_config_and_end_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path, [1, 2])
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    run_id, config, rows, exit_code = wandb_records(first)
    assert config["seed"] == 3
    assert config["model"]["hidden_size"] == 64
    assert [(r["step"], r["reward/mean"]) for r in rows] == [(1, 0.1), (2, 0.2)]
    assert rows[1]["staleness/histogram.values"] == [6, 0, 2]
    assert "policy/grad_norm" not in rows[0]
    assert exit_code == 0

    track("wandb", tmp_path, [2, 3], status="failed")
    (second,) = set((tmp_path / "wandb").glob("offline-run-*")) - {first}
    again, _, rows, exit_code = wandb_records(second)
    assert again == run_id
    assert [r["step"] for r in rows] == [2, 3]
    assert exit_code == 1


def test_wandb_without_a_login_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    track("wandb", tmp_path, [1])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_mlflow_run_in_a_database_has_steps_and_parameters_and_goes_on(tmp_path, monkeypatch):
    tmp_path = tmp_path / "run-a"
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", tmp_path, [1, 2], status="interrupted")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("proj").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "run-a"
    assert run.info.status == "KILLED"
    assert run.data.params == {
        "seed": "3",
        "model.hidden_size": "64",
        "model.path": "None",
        "engine.urls": "()",
    }
    track("mlflow", tmp_path, [3])
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((m.step, m.value) for m in history) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_trackio_run_in_its_local_database_goes_on(tmp_path):
    """In processes of their own: the library reads its folder's place when it is imported."""
    pytest.importorskip("trackio")
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    code = (
        "import sys; from pathlib import Path; from tests.metrics.test_trackers_real import track; "
        "track('trackio', Path(sys.argv[1]), [int(s) for s in sys.argv[2:]])"
    )
    for steps in (["1", "2"], ["3"]):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run-a"), *steps],
            env=environment,
            check=True,
            timeout=WAIT_S,
            cwd=ROOT,
        )
    read = (
        "import json, trackio; (run,) = trackio.Api().runs('proj'); "
        "logs = trackio.SQLiteStorage.get_logs('proj', run.name, run_id=run.id); "
        "print(json.dumps([run.name, run.config, logs], default=str))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", read],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    name, config, rows = json.loads(answer.stdout.splitlines()[-1])
    assert name == "run-a"
    assert config["seed"] == 3
    assert [(r["step"], r["reward/mean"]) for r in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert rows[0]["staleness/histogram"]["values"] == [6, 0, 1]
