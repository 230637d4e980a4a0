"""What an SGLang server says of itself, as plain values; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skyrl_async.rollout.engine_errors import BadReply, UnsupportedServer, UnverifiedWeights
from skyrl_async.rollout.engine_launch import MIN_ADAPTER_VERSION, ServedAdapters, is_recent
from skyrl_async.rollout.sglang_protocol import adapter_version

OLDEST_VERSION = (0, 5, 21)
"""Older servers report no version per token, or load weights by other calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What a server has to do, over all its data-parallel ranks.

    Attributes:
        running: requests being decoded.
        waiting: requests queued.
        kv_usage: used part of the KV cache of the fullest rank, 0..1.
    """

    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is.

    Attributes:
        version: of SGLang.
        incremental: whether a chunk holds only new tokens (``--incremental-streaming-output``).
    """

    version: str
    incremental: bool


def parse_load(answer: Mapping[str, Any]) -> EngineLoad:
    """Read the answer to ``GET /v1/loads``.

    Raises:
        BadReply: if it is another one.
    """
    try:
        ranks = answer["loads"]
        return EngineLoad(
            running=sum(int(rank["num_running_reqs"]) for rank in ranks),
            waiting=sum(int(rank["num_waiting_reqs"]) for rank in ranks),
            kv_usage=max((float(rank["token_usage"]) for rank in ranks), default=0.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadReply(f"/v1/loads: {error!r} in {str(answer)[:500]}") from None


def newest_adapter(answer: Mapping[str, Any]) -> int:
    """Return the newest policy version among the adapters in the answer to ``GET /v1/models``.

    Raises:
        BadReply: if it is another answer.
        UnverifiedWeights: if no adapter of ours is loaded.
    """
    try:
        names = [model["id"] for model in answer["data"]]
    except (KeyError, TypeError) as error:
        raise BadReply(f"/v1/models: {error!r} in {str(answer)[:500]}") from None
    versions = [v for v in map(adapter_version, names) if v is not None]
    if not versions:
        raise UnverifiedWeights(f"the server has loaded no adapter of ours, but {names}")
    return max(versions)


def adapter_problem(answer: Mapping[str, Any], adapters: ServedAdapters) -> str | None:
    """Return why a server cannot be given these adapters; None if it can.

    Args:
        answer: to ``GET /server_info``.
        adapters: that a server of our own would be started for.
    """
    version = str(answer.get("version"))
    if not is_recent(version, minimum=MIN_ADAPTER_VERSION):
        return f"SGLang {version!r} is too old for adapters; install sglang>={MIN_ADAPTER_VERSION}"
    modules = answer.get("lora_target_modules") or ()
    missing = () if "all" in modules else set(adapters.target_modules).difference(modules)
    rank, slots = answer.get("max_lora_rank") or 0, answer.get("max_loras_per_batch") or 0
    fits = rank >= adapters.rank and slots >= adapters.num_slots and not missing
    if answer.get("enable_lora") and fits:
        return None
    return (
        f"the server was started with enable_lora={answer.get('enable_lora')}, max_lora_rank={rank}"
        f", max_loras_per_batch={slots} and lora_target_modules={sorted(modules)}; start it with "
        f"--enable-lora --max-lora-rank {adapters.rank} --max-loras-per-batch {adapters.num_slots} "
        f"--lora-target-modules {' '.join(adapters.target_modules)}"
    )


def parse_server_info(answer: Mapping[str, Any]) -> ServerInfo:
    """Read the answer to ``GET /server_info``.

    Raises:
        UnsupportedServer: if the server is too old, or does not say its version.
    """
    version = str(answer.get("version"))
    if _numbers(version) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UnsupportedServer(f"SGLang {version!r} is too old; install sglang>={oldest}")
    return ServerInfo(version=version, incremental=bool(answer.get("incremental_streaming_output")))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of ``0.5.21.post1`` or ``0.6.0rc1``."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
