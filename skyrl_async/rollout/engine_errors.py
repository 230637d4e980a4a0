"""Why a request to an engine server failed, and whether another server may do better."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from skyrl_async.rollout.sglang_protocol import Reply


class EngineError(Exception):
    """A request failed.

    Attributes:
        retryable: whether the same request may succeed on another engine.
        partial: tokens that were received before and may be kept; None if none were asked for.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.partial: Reply | None = None


class InvalidRequest(EngineError, ValueError):
    """The request itself is wrong, on every engine: too long, or a token id that does not exist."""


class ConnectionLost(EngineError, RuntimeError):
    """The server refused the connection or closed it, for example because it died."""

    retryable = True


class EngineHangs(EngineError, RuntimeError):
    """The server sends nothing and answers nothing, or takes longer than the deadline."""

    retryable = True


class EngineUnavailable(EngineError, RuntimeError):
    """The server answered that it cannot serve requests now (5xx, or too many requests)."""

    retryable = True


class AbortedByServer(EngineError, RuntimeError):
    """The server ended the request before it was whole, for example at its shutdown."""

    retryable = True


class UnverifiedWeights(EngineError, RuntimeError):
    """The server generates with weights that are not known to be a policy version."""

    retryable = True


class AdapterGone(EngineError, RuntimeError):
    """The server does not have the adapter that the request names, perhaps no more."""

    retryable = True


class AccessRefused(EngineError, RuntimeError):
    """The server does not accept the key; after a restart it may be another server's port."""

    retryable = True


class BadReply(EngineError, RuntimeError):
    """The server's reply is not what SGLang sends."""


class NonfiniteLogprob(EngineError, RuntimeError):
    """A sampled token has no finite logprob."""


class UnsupportedServer(EngineError, RuntimeError):
    """The server is too old."""


def error_of_status(status: int, message: str) -> EngineError:
    """Return the error that an HTTP status means.

    Args:
        status: 4xx or 5xx.
        message: of the server.
    """
    said = f"the server answered {status}: {message[:500]}"
    if status in (401, 403):
        return AccessRefused(f"{said}; is the api_key that of this server?")
    if status >= 500 or status in (408, 429):
        return EngineUnavailable(said)
    if "LoRA adapter" in message:
        return AdapterGone(said)
    return InvalidRequest(said)
