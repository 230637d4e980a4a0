"""Fixtures around the real SGLang server; a test file takes them with

pytest_plugins = ("tests.sglang_server",)

The environment variable ``SGLANG_PYTHON`` names the interpreter that has SGLang.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.rollout.engine_process import EngineProcess, RunningServer, ServerSettings

Result = TypeVar("Result")

START_TIMEOUT_S = 100.0
"""About 15 s on an idle machine."""


class LoopThread:
    """An event loop that goes on between the tests, as a server's owner needs one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, body: Coroutine[Any, Any, Result], *, timeout_s: float) -> Result:
        """Return the result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(body, self._loop).result(timeout_s)

    def close(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter that has SGLang."""
    named = os.environ.get("SGLANG_PYTHON")
    if not named:
        pytest.skip("SGLANG_PYTHON names no interpreter that has SGLang")
    return Path(named)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in tiny policy with its tokenizer, as Hugging Face files; never change it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_model().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sglang_settings(sglang_python: Path, tiny_model_folder: Path) -> Callable[..., ServerSettings]:
    """``sglang_settings(log_path, **changes)``: a small server of the tiny policy on the CPU."""

    def make(log_path: Path, **changes: Any) -> ServerSettings:
        values: dict[str, Any] = {
            "python": sglang_python,
            "model_path": tiny_model_folder,
            "device": "cpu",
            "dtype": "float32",
            "context_length": 4096,
            "max_running_requests": 16,
            "max_total_tokens": 16384,
            "start_timeout_s": START_TIMEOUT_S,
        }
        return ServerSettings(log_path=log_path, **(values | changes))

    return make


@pytest.fixture(scope="session")
def sglang_server(
    sglang_settings: Callable[..., ServerSettings], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One running server for all tests; leave it unpaused, idle, and with its own weights."""
    log_path = tmp_path_factory.mktemp("sglang") / "server.log"
    loop = LoopThread()
    try:
        engine = EngineProcess(sglang_settings(log_path))
        server = loop.run(engine.start(), timeout_s=START_TIMEOUT_S + 60)
        yield server
        loop.run(engine.stop(timeout_s=1.0), timeout_s=60)
    finally:
        loop.close()
