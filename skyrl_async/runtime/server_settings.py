"""From the configuration to what an SGLang server is started with, or found by."""

from __future__ import annotations

import os
from pathlib import Path

from skyrl_async.config import Config
from skyrl_async.learner.policy import load_model, load_tokenizer, save_policy
from skyrl_async.rollout.engine_process import ServerSettings
from skyrl_async.rollout.external_server import ExternalAddress
from skyrl_async.runtime.published_adapters import served_adapters
from skyrl_async.runtime.settings import policy_source


def server_settings(config: Config, *, name: str, folder: Path, host: str) -> ServerSettings:
    """Return the settings of one server; writes the built-in policy where it can be served from.

    Args:
        config: of the run, with ``engine.python``.
        name: of the engine.
        folder: of the run.
        host: address to listen on.
    """
    engine, model = config.engine, config.model
    own = folder / "engines" / name.replace(" ", "_")
    own.mkdir(parents=True, exist_ok=True)
    path = model.path
    if path is None:
        source = policy_source(config)
        save_policy(load_model(source), load_tokenizer(source), own / "model")
        path = str(own / "model")
    tokens = engine.max_total_tokens
    if tokens is None and engine.device == "cpu":
        tokens = engine.max_concurrent * engine.context_length
    assert engine.python is not None
    return ServerSettings(
        python=Path(engine.python),
        model_path=Path(path),
        host=host,
        device=engine.device,
        dtype=model.dtype,
        context_length=engine.context_length,
        max_running_requests=engine.max_concurrent,
        max_total_tokens=tokens,
        extra_args=engine.sglang_args,
        adapters=served_adapters(config),
        log_path=own / "server.log",
        start_timeout_s=engine.start_timeout_s,
        num_threads=engine.num_threads,
    )


def external_server(config: Config, *, index: int) -> ExternalAddress:
    """Return where a server of ``engine.urls`` is, with its keys from the environment.

    Raises:
        ValueError: if a variable that the configuration names is not set.
    """
    engine = config.engine
    api_key = _secret("engine.api_key_env", engine.api_key_env)
    return ExternalAddress(
        url=engine.urls[index],
        api_key=api_key,
        admin_key=_secret("engine.admin_key_env", engine.admin_key_env) or api_key,
    )


def _secret(key: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{key}={variable}: this environment variable is not set or is empty")
    return value
