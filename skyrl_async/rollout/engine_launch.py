"""What an SGLang server is started with: its settings, version check, command and environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIN_SGLANG_VERSION = "0.5.21"
"""The first with ``begin_weight_update`` and ``end_weight_update``; older ones lack them."""

MIN_ADAPTER_VERSION = "0.5.23"
"""For servers of adapters; 0.5.21 counts a request that was aborted in its queue as running for
ever, so that its adapter is never unloaded, and no other can be loaded. 0.5.22 was not tried."""

UNVERIFIED_WEIGHTS = "unverified"
"""``weight_version`` of a server that nobody has loaded verified weights into."""

FAST_START_FILE = "sglang_fast_start.env"
"""In the folder of an environment made by ``launchers/sglang_cpu/install.sh``."""

_FAST_START_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_VERSION_TIMEOUT_S = 30.0
_VERSION_CODE = "import importlib.metadata as m; print(m.version('sglang'))"

# What this module decides; argparse also takes every unambiguous beginning of a flag.
_OWN_FLAGS = (
    *("--model-path", "--host", "--port", "--api-key", "--admin-api-key", "--config"),
    *("--device", "--dtype", "--context-length", "--max-running-requests", "--max-total-tokens"),
    "--weight-version",
    *("--enable-lora", "--lora-paths", "--max-lora-rank", "--lora-target-modules"),
    *("--max-loras-per-batch", "--max-loaded-loras"),
)
# They open a second way in that asks for no key, or move the one there is.
_REFUSED_FLAGS = (
    *("--grpc-mode", "--smg-grpc-mode", "--grpc-port", "--sidecar", "--sidecar-args"),
    *("--ssl-keyfile", "--ssl-certfile", "--fastapi-root-path", "--use-ray", "--encoder-only"),
)
# Of our own interpreter, and wrong for another one.
_OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class EngineStartError(RuntimeError):
    """A server could not be started.

    Attributes:
        last_lines: of its log, if it got that far.
    """

    def __init__(self, message: str, *, last_lines: tuple[str, ...] = ()) -> None:
        super().__init__("\n  ".join((message, *last_lines)))
        self.last_lines = last_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapters:
    """What low-rank adapters a server can be given while it runs.

    Attributes:
        rank: of the largest.
        target_modules: last parts of the names of the layers that they adapt.
        num_slots: different ones in one batch at most, requests without any included.

    Raises:
        ValueError: if a number is not positive, or there is no layer.
    """

    rank: int
    target_modules: tuple[str, ...]
    num_slots: int

    def __post_init__(self) -> None:
        if min(self.rank, self.num_slots, len(self.target_modules)) < 1:
            raise ValueError(
                f"rank={self.rank}, num_slots={self.num_slots} and the number of target_modules="
                f"{self.target_modules} must be >= 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How to start one SGLang server.

    Attributes:
        python: interpreter that has SGLang.
        model_path: folder of the model, with its tokenizer.
        log_path: of the server's output, appended to; made readable for its owner alone.
        device: ``cpu`` or ``cuda``.
        dtype: of weights and activations, as SGLang names it.
        context_length: tokens of prompt and reply together.
        max_running_requests: decoded at once.
        max_total_tokens: of the KV cache. None: as much as fits on a GPU, and room for
            ``max_running_requests`` full contexts on a CPU.
        host: address to listen on.
        port: 0 for a free one.
        extra_args: further command line arguments of SGLang, such as ``("--tp-size", "2")``.
        start_timeout_s: until the server answers.
        num_threads: of the server's computations on a CPU.
        adapters: that it serves; None for weights alone.

    Raises:
        ValueError: on a value out of range, or an extra argument that is decided here.
    """

    python: Path
    model_path: Path
    log_path: Path
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: str = "bfloat16"
    context_length: int = 2048
    max_running_requests: int = 64
    max_total_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    extra_args: tuple[str, ...] = ()
    start_timeout_s: float = 600.0
    num_threads: int = 1
    adapters: ServedAdapters | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        for name in ("context_length", "max_running_requests", "num_threads", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.max_total_tokens is not None and self.max_total_tokens < self.context_length:
            raise ValueError(
                f"max_total_tokens must hold one full context of {self.context_length} tokens, "
                f"got {self.max_total_tokens}"
            )
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if not self.host or not self.dtype:
            raise ValueError(f"host and dtype must not be empty: {self.host!r}, {self.dtype!r}")
        check_extra_args(self.extra_args)


def check_extra_args(args: tuple[str, ...]) -> None:
    """Raise ValueError if one of SGLang's arguments is decided here, or opens another way in."""
    for arg in args:
        if not isinstance(arg, str):
            raise ValueError(f"extra_args must be strings, got {arg!r}")
        flag = arg.partition("=")[0].replace("_", "-")
        if len(flag) < 3 or not flag.startswith("--"):
            continue
        for own in _OWN_FLAGS:
            if own.startswith(flag):
                raise ValueError(
                    f"extra_args must not have {arg.partition('=')[0]!r}: {own} is set by the "
                    "fields of ServerSettings, keys and weight version at each start"
                )
        if flag in _REFUSED_FLAGS:
            raise ValueError(
                f"extra_args must not have {flag!r}: only plain HTTP with keys is supported"
            )


async def check_version(settings: ServerSettings) -> str:
    """Return the version of SGLang that the interpreter has, without importing SGLang.

    Raises:
        EngineStartError: if there is no such interpreter, no SGLang, or too old a one.
    """
    minimum = MIN_SGLANG_VERSION if settings.adapters is None else MIN_ADAPTER_VERSION
    remedy = f"install sglang>={minimum} there, or name another interpreter"
    try:
        process = await asyncio.create_subprocess_exec(
            *(str(settings.python), "-c", _VERSION_CODE),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=server_environment(settings),
        )
    except OSError as error:
        raise EngineStartError(
            f"cannot run the interpreter {settings.python} ({error.strerror}): {remedy}"
        ) from None
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _VERSION_TIMEOUT_S)
    except TimeoutError:
        raise EngineStartError(
            f"{settings.python} did not name its version of SGLang within {_VERSION_TIMEOUT_S:g} s"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = tuple(errors.decode(errors="replace").strip().splitlines()[-1:])
        raise EngineStartError(f"{settings.python} has no SGLang: {remedy}", last_lines=lines)
    version = output.decode().strip().rpartition("\n")[2]
    if not is_recent(version, minimum=minimum):
        purpose = "" if settings.adapters is None else "for lora.publish=adapter "
        raise EngineStartError(
            f"{settings.python} has SGLang {version or '?'}, {purpose}at least {minimum} is "
            f"needed: {remedy}"
        )
    return version


def is_recent(version: str, *, minimum: str) -> bool:
    """Return whether a version of SGLang is ``minimum`` or newer."""
    oldest = tuple(int(part) for part in minimum.split("."))
    parsed = re.match(r"(\d+(?:\.\d+)*)(.*)", version)
    if parsed is None:
        return False
    release = tuple(int(part) for part in parsed[1].split("."))
    before_release = re.match(r"[-_.]?(a|b|rc|dev)", parsed[2]) is not None
    return release > oldest or (release == oldest and not before_release)


def server_command(settings: ServerSettings, *, port: int) -> list[str]:
    """Return the command line of the server, without keys."""
    command = [
        *(str(settings.python), "-m", "sglang.launch_server"),
        *("--model-path", str(settings.model_path)),
        *("--host", settings.host, "--port", str(port)),
        *("--device", settings.device, "--dtype", settings.dtype),
        *("--context-length", str(settings.context_length)),
        *("--max-running-requests", str(settings.max_running_requests)),
        *("--weight-version", UNVERIFIED_WEIGHTS),
        *("--log-level-http", "warning"),
        # Each chunk of a stream has its own tokens only; repeating all costs the square of them.
        "--incremental-streaming-output",
    ]
    total = settings.max_total_tokens
    if settings.device == "cpu":
        # Without a number SGLang takes a share of the machine's memory, whoever else needs it.
        total = total or settings.max_running_requests * settings.context_length
        # The default attention on a CPU needs compiled kernels that no package index has.
        command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        command += ["--cuda-graph-backend-decode", "disabled", "--skip-server-warmup"]
        # An idle scheduler would keep a core busy.
        command += ["--sleep-on-idle"]
    if total is not None:
        command += ["--max-total-tokens", str(total)]
    if settings.adapters is not None:
        command += _adapter_arguments(settings.adapters, settings.device)
    return [*command, *settings.extra_args]


def _adapter_arguments(adapters: ServedAdapters, device: str) -> list[str]:
    return [
        *("--enable-lora", "--max-lora-rank", str(adapters.rank)),
        *("--lora-target-modules", *adapters.target_modules),
        *("--max-loras-per-batch", str(adapters.num_slots)),
        # Its own choice computes on GPUs only.
        *(("--lora-backend", "torch_native") if device == "cpu" else ()),
    ]


def server_environment(settings: ServerSettings) -> dict[str, str]:
    """Return the environment of the server: ours, with what a server without a GPU needs."""
    environment = {k: v for k, v in os.environ.items() if k not in _OWN_VARIABLES}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if settings.host in _LOOPBACK:
        # Groups with a learner on this machine must not listen on other interfaces.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    if settings.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["OMP_NUM_THREADS"] = str(settings.num_threads)
        environment.update(_fast_start(settings))
    return environment


def _fast_start(settings: ServerSettings) -> Mapping[str, str]:
    """Return what keeps SGLang from importing its other models, if this model is a common one."""
    file = settings.python.absolute().parent.parent / FAST_START_FILE
    try:
        config = json.loads((settings.model_path / "config.json").read_text(encoding="utf-8"))
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("model_type") not in _FAST_START_MODEL_TYPES:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def free_port(host: str) -> int:
    """Return a port of ``host`` that nobody listens on just now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
