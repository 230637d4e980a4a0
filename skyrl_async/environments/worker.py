"""A process that plays synchronous environments, one call at a time.

It is started by :mod:`skyrl_async.environments.worker_process` with a socket as standard input, and
never imports torch. Both ways, a message is one line of JSON::

    parent: {"entry_point": "module:Class", "options": {...}, "max_observation_chars": 20000}
    worker: "ready"
    parent: ["reset", 7, seed, {extras}]      worker: observation
    parent: ["step", 7, reply]                worker: [observation, reward, terminated, truncated]
    parent: ["close", 7]                      worker: null
    parent: ["exit"]                          worker: null, then it closes what is open and exits

where 7 is the session. A failed call is answered ``{"reason": ..., "detail": ...}``. Answers come
in the order of the calls. What an environment prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.outcomes import checked_reset, checked_step, described_error
from skyrl_async.environments.registry import load_class
from skyrl_async.types import DropReason

_PR_SET_PDEATHSIG = 1
PARENT_IS_GONE = 81
"""Exit code of a worker whose parent ended while it started."""


class EnvironmentServer:
    """Answers messages; whatever user code raises becomes an answer.

    Args:
        hello: first message of the parent.

    Raises:
        ValueError: if the class cannot be imported.
    """

    def __init__(self, hello: dict[str, Any]) -> None:
        self._class = load_class(hello["entry_point"])
        self._options = hello["options"]
        self._max_observation_chars = hello["max_observation_chars"]
        self._environments: dict[int, Any] = {}

    def answer(self, message: list[Any]) -> bytes:
        """Do what a message asks, and return the answer as a line."""
        call, *arguments = message
        try:
            return encoded(getattr(self, f"_{call}")(*arguments))
        except BaseException as error:
            if isinstance(error, EnvironmentFailure):
                return encoded({"reason": error.reason.value, "detail": error.detail})
            detail = described_error(error, doing=call)
            return encoded({"reason": DropReason.ENVIRONMENT_ERROR.value, "detail": detail})

    def _reset(self, session: int, seed: int, extras: dict[str, Any]) -> str:
        environment = self._class(**self._options)
        self._environments[session] = environment
        value = environment.reset(seed=seed, options=extras)
        return checked_reset(value, max_observation_chars=self._max_observation_chars)

    def _step(self, session: int, reply: str) -> list[Any]:
        value = self._environments[session].step(reply)
        outcome = checked_step(value, max_observation_chars=self._max_observation_chars)
        return [outcome.observation, outcome.reward, outcome.terminated, outcome.truncated]

    def _close(self, session: int) -> None:
        close = getattr(self._environments.pop(session, None), "close", None)
        if close is not None:
            close()

    def _exit(self) -> None:
        for session in list(self._environments):
            self.answer(["close", session])


def encoded(message: Any) -> bytes:
    """Return one line; it is ASCII, so every text survives, lone surrogates of replies too."""
    return json.dumps(message).encode() + b"\n"


def main() -> None:
    """Serve the socket on standard input until the parent says exit, or is gone."""
    _die_with_parent(int(sys.argv[1]))
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    lines = channel.makefile("rb")
    hello = lines.readline()
    if not hello:
        return
    try:
        server = EnvironmentServer(json.loads(hello))
    except BaseException as error:
        channel.sendall(encoded({"detail": described_error(error, doing="starting")}))
        return
    channel.sendall(encoded("ready"))
    with suppress(ConnectionError):  # the parent is gone
        for line in lines:
            message = json.loads(line)
            channel.sendall(server.answer(message))
            if message[0] == "exit":
                return


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent ends, even amid a call (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(PARENT_IS_GONE)


if __name__ == "__main__":
    main()
