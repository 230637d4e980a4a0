"""What we rely on in the real server: who may do what, and that no process of it is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from skyrl_async.rollout import engine_process
from skyrl_async.rollout.engine_process import EngineProcess, EngineStartError
from tests.rollout.server_processes import alive, assert_vanish, group_of, run_async

pytest_plugins = ("tests.sglang_server",)
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

OPEN = {"/health", "/health_generate", "/ready"}
"""Paths that need no key; the second runs one token through the model."""

GENERATION = {
    *("/", "/generate", "/encode", "/classify", "/invocations", "/ping", "/tokenize"),
    *("/detokenize", "/parse_function_call", "/separate_reasoning"),
    *("/open_session", "/close_session"),
    *("/model_info", "/get_model_info", "/vertex_generate"),
}
"""Paths that the api key opens, besides ``/v1`` and ``/api``: they change no other's requests."""

BEYOND_GENERATION = {
    "/set_trace_level": "how much is traced",
    "/scale_elastic_ep": "adds expert-parallel ranks, if the server was started for that",
    "/is_scaling_elastic_ep": "whether it does so",
    "/get_hicache_l3_cache_layout": "shows how a cache is laid out",
    "/load_lora_adapter_from_tensors": "loads an adapter, if the server was started with LoRA",
    "/server_info": "shows both keys, so that whoever has the api key has the admin key too",
    "/get_server_info": "the same",
}
"""Paths that the api key opens, in one version or another, although they are no generation."""

OWNER = """
import asyncio, sys
from pathlib import Path
from skyrl_async.rollout.engine_process import EngineProcess, ServerSettings

async def main():
    python, model, log_path = map(Path, sys.argv[1:])
    engine = EngineProcess(ServerSettings(
        python=python, model_path=model, log_path=log_path, device="cpu", dtype="float32",
        context_length=512, max_total_tokens=4096))
    server = await engine.start()
    print(server.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def call(url: str, key: str | None, *, method: str = "GET", body: Any = None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def routes(server) -> list[tuple[str, str]]:
    """Return method and path of all that the server offers, new endpoints included."""
    status, body = call(f"{server.url}/openapi.json", server.api_key)
    assert status == 200
    paths = json.loads(body)["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def allows_generation(path: str) -> bool:
    return path in GENERATION or path.startswith(("/v1/", "/api/"))


def is_refused(server, method: str, path: str, key: str | None) -> bool:
    # An empty body is no valid request of any endpoint that changes something.
    path = re.sub(r"\{.*?\}", "x", path)
    return call(f"{server.url}{path}", key, method=method, body=[])[0] in (401, 403)


def test_tiny_policy_is_served_token_by_token(sglang_server):
    body = {
        "input_ids": [[6, 7, 8], [9, 10]],
        "sampling_params": {"max_new_tokens": 5, "ignore_eos": True, "temperature": 1.0},
        "return_logprob": True,
    }

    status, answer = call(
        f"{sglang_server.url}/generate", sglang_server.api_key, method="POST", body=body
    )

    assert status == 200
    for reply in json.loads(answer):
        meta = reply["meta_info"]
        assert len(reply["output_ids"]) == len(meta["output_token_logprobs"]) == 5
        (span,) = meta["weight_versions"]
        assert (span["version"], span["start"], span["end"]) == ("unverified", 0, 5)


def test_calls_without_a_key_are_refused(sglang_server):
    listed = routes(sglang_server)
    assert ("POST", "/update_weights_from_distributed") in listed and len(listed) > 80

    open_to_all = {
        p for m, p in listed if p not in OPEN and not is_refused(sglang_server, m, p, "")
    }

    assert open_to_all == set()
    assert call(f"{sglang_server.url}/openapi.json", None)[0] == 401


def test_weights_and_control_need_the_admin_key(sglang_server):
    key = sglang_server.api_key
    control = [(m, p) for m, p in routes(sglang_server) if not allows_generation(p)]
    control = [(m, p) for m, p in control if p not in OPEN | BEYOND_GENERATION.keys()]
    names = {path for _, path in control}
    assert {"/pause_generation", "/update_weights_from_tensor", "/abort_request"} <= names

    assert [p for m, p in control if not is_refused(sglang_server, m, p, key)] == []
    assert not is_refused(sglang_server, "POST", "/pause_generation", sglang_server.admin_key)


def test_api_key_shows_the_admin_key_which_does_not_generate(sglang_server):
    server = sglang_server
    assert not is_refused(server, "POST", "/generate", server.api_key)
    assert is_refused(server, "POST", "/generate", server.admin_key)
    info = call(f"{server.url}/server_info", server.api_key)[1]
    assert server.admin_key.encode() in info, "hidden now: say so where RunningServer is described"


def test_keys_are_in_no_command_line_environment_or_log(sglang_settings, tmp_path):
    settings = sglang_settings(tmp_path / "server.log")

    async def body():
        engine = EngineProcess(settings)
        server = await engine.start()
        group = group_of(server.pid)
        texts = []
        for pid in group:
            texts += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        # The probe makes the server write its whole state to nobody but us.
        await engine_process.probe(server, timeout_s=10)
        report = await engine.stop(timeout_s=15)
        assert not alive(group)
        return server, texts, report

    server, texts, report = run_async(body, timeout_s=300)

    log = settings.log_path.read_text()
    assert len(texts) >= 6, "the server, its scheduler and its detokenizer"
    assert log.count("***") >= 2, "SGLang writes its arguments, keys included"
    for key in (server.api_key, server.admin_key):
        assert key not in log and not any(key.encode() in text for text in texts)
    assert report.returncode == 0


def test_probe_goes_through_the_scheduler_also_while_generation_is_paused(sglang_server):
    def control(path: str, body: dict[str, Any]) -> int:
        url = f"{sglang_server.url}/{path}"
        return call(url, sglang_server.admin_key, method="POST", body=body)[0]

    (scheduler,) = [
        pid
        for pid in group_of(sglang_server.pid)
        if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]

    async def probe(timeout_s: float) -> None:
        await engine_process.probe(sglang_server, timeout_s=timeout_s)

    assert control("pause_generation", {"mode": "retract"}) == 200
    try:
        run_async(lambda: probe(20.0))
        os.kill(scheduler, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                run_async(lambda: probe(2.0))
        finally:
            os.kill(scheduler, signal.SIGCONT)
        run_async(lambda: probe(20.0))
    finally:
        assert control("continue_generation", {"torch_empty_cache": False}) == 200


def test_no_process_is_left_when_the_owner_is_killed(sglang_python, tiny_model_folder, tmp_path):
    command = [sys.executable, "-c", OWNER]
    command += map(str, (sglang_python, tiny_model_folder, tmp_path / "server.log"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        leader = int(owner.stdout.readline())
        group = group_of(leader)
        assert len(alive(group)) >= 3
        owner.kill()

    assert_vanish(group)
    assert not group_of(leader)


def test_failed_start_says_why(sglang_settings, tmp_path):
    settings = sglang_settings(tmp_path / "server.log", model_path=tmp_path / "nothing")

    async def body():
        with pytest.raises(EngineStartError) as caught:
            await EngineProcess(settings).start()
        return str(caught.value)

    message = run_async(body, timeout_s=200)

    assert "before it answered" in message and "nothing" in message


def test_death_of_the_scheduler_ends_the_server(sglang_settings, tmp_path):
    settings = sglang_settings(tmp_path / "server.log")

    async def body():
        engine = EngineProcess(settings)
        server = await engine.start()
        group = group_of(server.pid)
        for pid in group:
            if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            report = await engine.wait()
        assert not alive(group)
        return report

    assert run_async(body, timeout_s=300).returncode != 0
