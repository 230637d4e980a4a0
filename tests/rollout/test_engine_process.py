from __future__ import annotations

import asyncio
import http.server
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
from pathlib import Path

import pytest

from skyrl_async.rollout import engine_process
from skyrl_async.rollout.engine_process import EngineProcess, EngineStartError, ServerSettings
from tests.rollout.server_processes import (
    alive,
    assert_vanish,
    fake_python,
    fake_settings,
    processes_in,
    run_async,
    start_error,
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


def test_log_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    error = start_error(fake_settings(tmp_path, log_path=tmp_path / "nowhere" / "server.log"))
    assert "No such file" in str(error) and "nowhere" in str(error)


def test_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", engine_process.free_port("127.0.0.1")))
