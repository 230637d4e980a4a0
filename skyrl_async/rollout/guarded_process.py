"""Our end of one guard, see :mod:`skyrl_async.rollout.engine_guard`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_async.rollout import engine_guard

_MAX_EVENT_BYTES = 1 << 20
_GUARD_EXIT_MARGIN_S = engine_guard.SWEEP_TIMEOUT_S + 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReport:
    """How a server ended, all its processes included.

    Attributes:
        returncode: negative for a signal; None if that is unknown because its guard was killed.
        last_lines: of its log, oldest first, without secrets.
    """

    returncode: int | None
    last_lines: tuple[str, ...] = ()


class GuardedProcess:
    """A server under a guard: ``await launch()``, then ``await wait()`` or ``await stop()``.

    Dropping it, closing the event loop, or ending this process in any way kills the server.

    Args:
        command: of the server; ``--config FILE`` with the keys is added.
        environment: of the server, complete.
        keys: secret values by command line flag, without dashes.
        log_path: of the server's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        keys: Mapping[str, str],
        log_path: Path,
    ) -> None:
        self._order = {
            "order": "start",
            "command": list(command),
            "keys": dict(keys),
            "log_path": str(log_path),
        }
        self._environment = dict(environment)
        self._guard: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[ExitReport] | None = None

    async def launch(self) -> int:
        """Start the server and return its process id.

        Raises:
            OSError: if it cannot be started, or its log not be written.
        """
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", engine_guard.__file__, str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C does not reach it; the server is stopped in order.
            start_new_session=True,
            limit=_MAX_EVENT_BYTES,
        )
        self._guard = guard
        try:
            self._send(self._order)
            assert guard.stdout is not None
            line = await guard.stdout.readline()
        except BaseException:
            await self.kill()
            raise
        event = json.loads(line) if line else {"reason": "its guard ended at once"}
        if event.get("event") != "started":
            await _end(guard)
            raise OSError(event["reason"])
        self._ended = asyncio.create_task(self._watch(guard, event))
        return int(event["pid"])

    def forget_keys(self) -> None:
        """Delete the file with the keys, which the server has read."""
        self._send({"order": "forget_keys"})

    async def kill(self) -> None:
        """Kill the server; return when none of its processes is left."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            ending = self.wait() if self._ended is not None else _end(self._guard)
            await asyncio.wait_for(ending, _GUARD_EXIT_MARGIN_S)

    async def stop(self, *, timeout_s: float) -> ExitReport:
        """End the server; return when none of its processes is left.

        Args:
            timeout_s: for it to end by itself, before it is killed.

        Raises:
            TimeoutError: if a killed process does not vanish.
        """
        self._send({"order": "stop", "timeout_s": timeout_s})
        try:
            return await asyncio.wait_for(self.wait(), timeout_s + _GUARD_EXIT_MARGIN_S)
        except BaseException:
            await self.kill()
            raise

    async def wait(self) -> ExitReport:
        """Return when the server has ended and none of its processes is left."""
        if self._ended is None:
            raise RuntimeError("launch() the server before waiting for its end")
        return await asyncio.shield(self._ended)

    def _send(self, order: Mapping[str, object]) -> None:
        assert self._guard is not None and self._guard.stdin is not None
        with suppress(ConnectionError, RuntimeError):  # A guard that has ended wants no orders.
            self._guard.stdin.write(json.dumps(order).encode() + b"\n")

    async def _watch(
        self, guard: asyncio.subprocess.Process, started: Mapping[str, Any]
    ) -> ExitReport:
        assert guard.stdout is not None
        line = await guard.stdout.readline()
        if not line:
            # The guard was killed. The kernel has killed the server with it, and the rest goes now.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(started["pid"], signal.SIGKILL)
            shutil.rmtree(started["key_folder"], ignore_errors=True)
        await _end(guard)
        if not line:
            return ExitReport(returncode=None)
        event = json.loads(line)
        return ExitReport(returncode=event["returncode"], last_lines=tuple(event["lines"]))


async def _end(guard: asyncio.subprocess.Process) -> None:
    """Wait for the end of a guard, and of its pipes, so that the event loop may be closed."""
    assert guard.stdout is not None
    await guard.stdout.read()
    await guard.wait()
