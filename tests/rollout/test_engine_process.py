from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from skyrl_async.rollout import engine_guard, engine_process
from skyrl_async.rollout.engine_guard import ServerLog
from skyrl_async.rollout.engine_launch import (
    FAST_START_FILE,
    ServedAdapters,
    check_version,
    server_command,
    server_environment,
)
from skyrl_async.rollout.engine_process import EngineProcess, EngineStartError, ServerSettings
from tests.rollout.server_processes import (
    alive,
    assert_vanish,
    fake_python,
    fake_settings,
    processes_in,
    run_async,
)

OWNER = """
import asyncio, sys
from pathlib import Path
from skyrl_async.rollout.engine_process import EngineProcess, ServerSettings

async def main():
    python, folder = Path(sys.argv[1]), Path(sys.argv[2])
    engine = EngineProcess(ServerSettings(
        python=python, model_path=folder, log_path=folder / "server.log", device="cpu"))
    await engine.start()
    print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def status_of(url: str, key: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def started(settings: ServerSettings, body):
    """Return what ``body(engine, server)`` does with a running server, which is stopped then."""

    async def whole():
        engine = EngineProcess(settings)
        server = await engine.start()
        try:
            return await body(engine, server)
        finally:
            await engine.stop(timeout_s=5)

    result = run_async(whole)
    assert not alive(processes_in(settings.log_path))
    return result


def start_error(settings: ServerSettings) -> EngineStartError:
    with pytest.raises(EngineStartError) as caught:
        run_async(EngineProcess(settings).start)
    return caught.value


# --- a server that is well


def test_started_server_answers_to_its_own_keys_alone(tmp_path):
    python = fake_python(tmp_path / "fake")

    async def look(engine, server):
        url = f"{server.url}/server_info"
        statuses = [status_of(url, k) for k in (server.api_key, server.admin_key, None)]
        await engine_process.probe(server, timeout_s=5)
        return server, statuses

    runs = [started(fake_settings(tmp_path, python=python), look) for _ in range(2)]

    assert [statuses for _, statuses in runs] == [[200, 401, 401]] * 2
    keys = {key for server, _ in runs for key in (server.api_key, server.admin_key)}
    assert len(keys) == 4, "every start has keys of its own"
    for server, _ in runs:
        assert server.url.startswith("http://127.0.0.1:") and server.sglang_version == "0.5.21"


def test_keys_are_in_no_log_command_line_environment_or_repr_and_in_no_file(tmp_path):
    settings = fake_settings(tmp_path, fake="prints_keys")
    before = children(os.getpid())

    async def look(engine, server):
        seen = [repr(server).encode(), repr(engine).encode()]
        pids = [*processes_in(settings.log_path), *children(os.getpid(), but=before)]
        assert len(pids) == 4, "the server, its children, and its guard"
        for pid in pids:
            seen += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        return server, seen

    server, seen = started(settings, look)

    log = settings.log_path.read_text()
    assert "'api_key': '***', 'admin_api_key': '***'" in log
    for key in (server.api_key, server.admin_key):
        assert not any(key.encode() in text for text in seen) and key not in log
    assert stat.S_IMODE(settings.log_path.stat().st_mode) == 0o600
    (key_file,) = re.findall(r"keys were in (\S+)", log)
    assert not Path(key_file).parent.exists()


def children(pid: int, *, but: Collection[int] = ()) -> list[int]:
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in listed for child in file.read_text().split()]
    return [child for child in found if child not in but]


def test_key_file_is_gone_as_soon_as_the_server_answers(tmp_path):
    settings = fake_settings(tmp_path)

    async def look(engine, server):
        (key_file,) = re.findall(r"keys were in (\S+)", settings.log_path.read_text())
        while Path(key_file).exists():
            await asyncio.sleep(0.01)
        return True

    assert started(settings, look)


@pytest.mark.parametrize(("fake", "returncode"), [("well", 0), ("ignores_sigterm", -9)])
def test_stop_asks_then_kills_and_leaves_no_process(tmp_path, fake, returncode):
    settings = fake_settings(tmp_path, fake=fake)

    async def body():
        engine = EngineProcess(settings)
        await engine.start()
        pids = processes_in(settings.log_path)
        assert len(alive(pids)) == 3
        report = await engine.stop(timeout_s=10 if returncode == 0 else 0.2)
        assert not alive(pids)
        assert await engine.wait() == report, "wait() reports the same, however often"
        return report

    assert run_async(body).returncode == returncode


def test_wait_reports_a_death_and_the_children_are_gone_then(tmp_path):
    settings = fake_settings(tmp_path)

    async def body():
        engine = EngineProcess(settings)
        server = await engine.start()
        os.kill(server.pid, signal.SIGKILL)
        report = await engine.wait()
        assert not alive(processes_in(settings.log_path))
        return report

    report = run_async(body)

    assert report.returncode == -9
    assert any(line.startswith("processes") for line in report.last_lines)


def test_an_engine_is_started_once_and_used_after_that(tmp_path):
    async def body():
        engine = EngineProcess(fake_settings(tmp_path, fake="dies"))
        with pytest.raises(RuntimeError, match="start"):
            await engine.wait()
        with pytest.raises(EngineStartError):
            await engine.start()
        with pytest.raises(RuntimeError, match="make a new EngineProcess"):
            await engine.start()

    run_async(body)


# --- nothing is left behind


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_server_does_not_outlive_an_owner_that_is_killed(tmp_path, number):
    python = fake_python(tmp_path / "fake")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(python), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None and owner.stdout.readline() == "started\n"
        pids = [*processes_in(tmp_path / "server.log"), *children(owner.pid)]
        assert len(alive(pids)) == 4
        owner.send_signal(number)
    assert_vanish(pids)


def test_server_does_not_outlive_its_guard(tmp_path):
    settings = fake_settings(tmp_path)

    async def body():
        before = children(os.getpid())
        engine = EngineProcess(settings)
        await engine.start()
        (guard,) = children(os.getpid(), but=before)
        os.kill(guard, signal.SIGKILL)
        return await engine.wait()

    assert run_async(body).returncode is None
    pids = processes_in(settings.log_path)
    assert_vanish(pids[:2])
    os.kill(pids[2], signal.SIGKILL)  # It left the process group, so only the guard could know it.


def test_sigterm_to_the_guard_ends_the_server_in_order(tmp_path):
    settings = fake_settings(tmp_path)

    async def body():
        before = children(os.getpid())
        engine = EngineProcess(settings)
        await engine.start()
        (guard,) = children(os.getpid(), but=before)
        os.kill(guard, signal.SIGTERM)
        return await engine.wait()

    assert run_async(body).returncode == 0
    assert not alive(processes_in(settings.log_path))


def test_start_that_is_cancelled_leaves_no_process(tmp_path):
    settings = fake_settings(tmp_path, fake="never_answers")

    async def body():
        starting = asyncio.create_task(EngineProcess(settings).start())
        while not (settings.log_path.exists() and processes_in(settings.log_path)):
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run_async(body)

    assert not alive(processes_in(settings.log_path))


# --- a server that is not well


def test_early_death_ends_the_start_with_what_the_log_said_last(tmp_path):
    settings = fake_settings(tmp_path, fake="dies", start_timeout_s=600)

    error = start_error(settings)

    assert error.last_lines[-1] == "RuntimeError: no room for the weights"
    assert "return code 3" in str(error) and "no room for the weights" in str(error)
    assert str(settings.log_path) in str(error)
    (key_file,) = re.findall(r"keys were in (\S+)", settings.log_path.read_text())
    assert not Path(key_file).exists() and not alive(processes_in(settings.log_path))


def test_server_that_does_not_answer_in_time_is_killed(tmp_path):
    settings = fake_settings(tmp_path, fake="never_answers", start_timeout_s=1.0)

    assert "did not answer within 1 s" in str(start_error(settings))
    assert not alive(processes_in(settings.log_path))


@pytest.fixture
def foreign_server():
    """The port of a server that answers everybody, and is not ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_port_that_was_taken_meanwhile_is_replaced_by_another(
    tmp_path, monkeypatch, foreign_server, free_port
):
    ports = iter([foreign_server, free_port])
    monkeypatch.setattr(engine_process, "free_port", lambda host: next(ports))

    async def look(engine, server):
        return server.url

    assert started(fake_settings(tmp_path), look) == f"http://127.0.0.1:{free_port}"


def test_fixed_port_that_is_taken_is_an_error_whoever_answers_there(tmp_path, foreign_server):
    error = start_error(fake_settings(tmp_path, port=foreign_server))

    assert "Address already in use" in str(error) and str(foreign_server) in str(error)


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


# --- the log


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_log_never_has_a_secret_however_it_arrives(tmp_path, size):
    text = b"a secret-1 b\nsecret-1secret-2\n\n c secret-2"
    log = ServerLog(tmp_path / "log", [b"secret-1", b"secret-2"])

    for start in range(0, len(text), size):
        log.write(text[start : start + size])
    log.close()

    assert (tmp_path / "log").read_bytes() == b"a *** b\n******\n\n c ***"
    assert list(log.last_lines) == ["a *** b", "******", " c ***"]


def test_endless_line_is_written_in_parts_without_its_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_guard, "_MAX_PENDING_BYTES", 20)
    log = ServerLog(tmp_path / "log", [b"secret"])
    for part in (b"x" * 30 + b"sec", b"ret" + b"y" * 40):
        log.write(part)
        assert b"sec" not in (tmp_path / "log").read_bytes()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"x" * 30 + b"***" + b"y" * 40


def test_long_log_is_begun_again_and_the_older_part_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_guard, "MAX_LOG_BYTES", 20)
    log = ServerLog(tmp_path / "log", [])
    for number in range(5):
        log.write(b"line %d ...\n" % number)
    log.close()
    kept = [(tmp_path / name).read_text().count("line") for name in ("log", "log.1")]
    assert kept == [1, 1]
    assert len(log.last_lines) == 5


def test_log_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    error = start_error(fake_settings(tmp_path, log_path=tmp_path / "nowhere" / "server.log"))
    assert "No such file" in str(error) and "nowhere" in str(error)


def test_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", engine_process.free_port("127.0.0.1")))
