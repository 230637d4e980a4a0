"""The section of the configuration for what generates, and what rules out what in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from skyrl_async.config_section import Section, Texts, show


class EngineSection(Section):
    """What generates."""

    kind: Literal["embedded", "sglang"] = "embedded"
    """embedded: in the actor's process, around the transformers model; sglang: SGLang servers."""
    max_concurrent: int = Field(default=256, ge=1)
    """Sequences that one engine decodes at once; further requests wait."""
    context_length: int = Field(default=128, ge=8)
    """Tokens per trajectory, prompt and replies together."""
    kv_after_swap: Literal["recompute", "keep"] = "recompute"
    """What happens to running requests at a weight swap: recompute their KV cache, or keep it."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads of an actor's process, or of a server on a CPU."""
    num_engines: int = Field(default=1, ge=1)
    """SGLang servers to start; not used with engine.urls."""
    python: str | None = None
    """Interpreter of the environment that has SGLang."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the engine computes on."""
    gpus_per_engine: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each SGLang server, or each rollout actor with its own engine."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a server's KV cache; without it, what max_concurrent sequences can need."""
    sglang_args: Texts = ()
    """Further arguments of SGLang's server, for example ["--tp-size", "2"]."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of each server; as in sglang_args."""
    urls: Texts = ()
    """Servers that somebody else runs, instead of our own: http://HOST:PORT each."""
    api_key_env: str | None = None
    """Environment variable with the API key of the servers of engine.urls."""
    admin_key_env: str | None = None
    """Environment variable with their admin key; without it their API key is used."""
    weight_load: Literal["memory", "file", "direct"] = "memory"
    """Staged beside a server and loaded from memory or a file, or sent into the paused server."""
    start_timeout_s: float = Field(default=300, gt=0)
    """A server that is not healthy by then has failed to start."""
    load_timeout_s: float = Field(default=60, gt=0)
    """A server that takes longer to load a version is started anew."""
    hang_timeout_s: float = Field(default=4, gt=0)
    """A server that answers nothing for this long is started anew."""


def engine_problems(engine: EngineSection, *, runtime: str, transport: str) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together.

    Args:
        engine: the section.
        runtime: of the run.
        transport: of the weights.
    """
    if engine.kind == "embedded":
        for name in ("urls", "python", "sglang_args"):
            if getattr(engine, name):
                yield (
                    f"engine.{name}={getattr(engine, name)}: engine.kind=embedded starts no "
                    "server; set engine.kind=sglang or remove it"
                )
        yield from _device_problems(engine, runtime)
        return
    if bool(engine.urls) == (engine.python is not None):
        yield (
            f"engine.urls={list(engine.urls)}, engine.python={show(engine.python)}: "
            "engine.kind=sglang needs one of them: servers that run already, or the "
            "interpreter of an environment with SGLang (launchers/sglang_cpu/install.sh "
            "makes one)"
        )
    if engine.weight_load == "direct" and transport != "collective":
        yield (
            f"weight_sync.transport={transport}: engine.weight_load=direct "
            "broadcasts; set weight_sync.transport=collective or engine.weight_load=memory"
        )
    if len(set(engine.urls)) < len(engine.urls):
        yield f"engine.urls={list(engine.urls)}: a server is named twice; name each once"


def _device_problems(engine: EngineSection, runtime: str) -> Iterator[str]:
    if engine.device == "cuda" and runtime == "ray" and not engine.gpus_per_engine:
        yield (
            "engine.device=cuda, engine.gpus_per_engine=0: Ray gives a rollout actor no GPU; set "
            "engine.gpus_per_engine to what each may have of one, for example 1 or 0.25"
        )
