from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from skyrl_async.rollout.engine_launch import (
    FAST_START_FILE,
    ServedAdapters,
    check_version,
    server_command,
    server_environment,
)
from skyrl_async.rollout.engine_process import EngineStartError
from tests.rollout.server_processes import (
    fake_python,
    fake_settings,
    run_async,
    start_error,
)

# --- versions


@pytest.mark.parametrize("version", ["0.5.20", "0.4.99.post3", "0.5.21rc1", "0.5.21.dev4+g1", "x"])
def test_older_sglang_is_refused_by_number(tmp_path, version):
    python = fake_python(tmp_path / "fake", version=version)

    message = str(start_error(fake_settings(tmp_path, python=python)))

    assert f"SGLang {version}," in message
    assert "at least 0.5.21" in message and "install sglang>=0.5.21" in message
    assert not (tmp_path / "server.log").exists(), "nothing was started"


@pytest.mark.parametrize("version", ["0.5.21", "0.5.21.post1", "0.5.23rc1", "0.6", "1.0.0"])
def test_newer_sglang_is_accepted(tmp_path, version):
    python = fake_python(tmp_path / "fake", version=version)

    settings = fake_settings(tmp_path, python=python)

    assert run_async(lambda: check_version(settings)) == version


def test_interpreter_without_sglang_and_missing_interpreter_are_refused(tmp_path):
    python = fake_python(tmp_path / "fake", version=None)
    message = str(start_error(fake_settings(tmp_path, python=python)))
    assert "has no SGLang" in message and "install sglang>=0.5.21" in message

    message = str(start_error(fake_settings(tmp_path, python=tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in message and "No such file" in message


def test_a_server_of_adapters_needs_a_version_that_unloads_them(tmp_path):
    adapters = ServedAdapters(rank=4, target_modules=("q_proj",), num_slots=4)
    old = fake_python(tmp_path / "old", version="0.5.22")
    plain = fake_settings(tmp_path, python=old)
    assert run_async(lambda: check_version(plain)) == "0.5.22"
    with pytest.raises(EngineStartError, match=r"lora.publish=adapter at least 0\.5\.23 is needed"):
        run_async(lambda: check_version(replace(plain, adapters=adapters)))
    new = fake_settings(tmp_path, python=fake_python(tmp_path / "new", version="0.5.23"))
    assert run_async(lambda: check_version(replace(new, adapters=adapters))) == "0.5.23"


# --- settings


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_server_is_told_which_adapters_it_will_be_given(tmp_path, device):
    adapters = ServedAdapters(rank=4, target_modules=("o_proj", "q_proj"), num_slots=6)
    extra = ("--tp-size", "1")
    settings = fake_settings(tmp_path, device=device, adapters=adapters, extra_args=extra)
    command = " ".join(server_command(settings, port=7))
    told = (
        "--enable-lora --max-lora-rank 4 --lora-target-modules o_proj q_proj "
        "--max-loras-per-batch 6"
    )
    on_cpu = " --lora-backend torch_native" if device == "cpu" else ""
    assert command.endswith(f"{told}{on_cpu} --tp-size 1")
    plain = server_command(replace(settings, adapters=None), port=7)
    assert not any("lora" in word for word in plain)


@pytest.mark.parametrize("change", [{"rank": 0}, {"num_slots": 0}, {"target_modules": ()}])
def test_adapters_without_rank_slots_or_layers_are_refused(change):
    values = {"rank": 4, "target_modules": ("q_proj",), "num_slots": 4, **change}
    with pytest.raises(ValueError, match="must be >= 1"):
        ServedAdapters(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"context_length": 0}, "context_length must be > 0, got 0"),
        ({"start_timeout_s": -1.0}, "start_timeout_s must be > 0"),
        ({"max_total_tokens": 5}, "one full context of 2048 tokens, got 5"),
        ({"port": 70000}, "port must be between 0 and 65535, got 70000"),
        ({"host": ""}, "host and dtype must not be empty"),
        ({"extra_args": ("--port", "1")}, "--port is set by"),
        ({"extra_args": ("--port=1",)}, "--port is set by"),
        ({"extra_args": ("--tp-size", "2", "--api-k", "x")}, "--api-key is set by"),
        ({"extra_args": ("--admin_api_key", "x")}, "--admin-api-key is set by"),
        ({"extra_args": ("--hos", "0.0.0.0")}, "--host is set by"),
        ({"extra_args": ("--config", "x.yaml")}, "--config is set by"),
        ({"extra_args": ("--grpc-port", "1")}, "only plain HTTP with keys"),
        ({"extra_args": ("--enable-lora",)}, "--enable-lora is set by"),
        ({"extra_args": ("--max-lora-rank", "64")}, "--max-lora-rank is set by"),
        ({"extra_args": (3,)}, "extra_args must be strings, got 3"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fake_settings(tmp_path, python=tmp_path, **changes)


def test_command_of_a_gpu_server_has_nothing_for_cpus(tmp_path):
    settings = fake_settings(
        tmp_path, python=tmp_path / "p", device="cuda", extra_args=("--tp-size", "2")
    )

    command = server_command(settings, port=7)
    environment = server_environment(settings)

    assert command[-2:] == ["--tp-size", "2"] and command[command.index("--port") + 1] == "7"
    assert not {"torch_native", "pytorch", "--max-total-tokens", "disabled"} & set(command)
    assert "SGLANG_USE_CPU_ENGINE" not in environment


def test_kv_cache_of_a_cpu_server_has_a_size_of_its_own(tmp_path):
    settings = fake_settings(tmp_path, python=tmp_path, max_running_requests=3, context_length=100)
    command = server_command(settings, port=7)
    assert command[command.index("--max-total-tokens") + 1] == "300"


@pytest.mark.parametrize(("model_type", "applied"), [("qwen3", True), ("gemma", False)])
def test_fast_start_is_applied_to_models_that_it_leaves_in(tmp_path, model_type, applied):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "venv" / FAST_START_FILE).write_text("SGLANG_DISABLED_MODEL_ARCHS=gemma,opt\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))

    environment = server_environment(fake_settings(tmp_path, python=python))

    disabled = environment.get("SGLANG_DISABLED_MODEL_ARCHS")
    assert disabled == ("gemma,opt" if applied else None)


def test_server_inherits_nothing_of_our_own_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    environment = server_environment(fake_settings(tmp_path, python=tmp_path))
    assert "PYTHONPATH" not in environment and environment["CUDA_VISIBLE_DEVICES"] == "3"
