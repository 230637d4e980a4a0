"""The parent's end of one worker process."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from skyrl_async.environments.worker import encoded

EXIT_TIMEOUT_S = 10.0
"""Seconds that a killed process gets to vanish before it is given up."""

STUCK_AFTER_S = 0.5
"""A process that takes longer for one call is avoided until it has answered."""

_CHECK_EVERY_S = STUCK_AFTER_S / 2
_READ_BYTES = 1 << 18

# The worker sees the modules that its parent sees; sys.path travels as an argument, because
# PYTHONPATH would be inherited by the programs that environments start.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv.pop().split(chr(10)); "
    "from skyrl_async.environments.worker import main; main()"
)


class WorkerHung(Exception):
    """The process was killed because this call missed its deadline."""


class WorkerDied(Exception):
    """The process ended by itself during this call; the argument says how."""


class WorkerLost(Exception):
    """The process ended before it came to this call; the argument says why."""


class WorkerBusy(Exception):
    """The process is stuck in another call, and this one should be made elsewhere."""


class WorkerStartFailed(WorkerLost):
    """The process ended, or was killed, before it was ready."""


@dataclass(slots=True)
class _Call:
    answer: asyncio.Future[Any]
    timeout_s: float
    patience_s: float


class WorkerProcess:
    """One process, and the calls that it has not answered yet, oldest first.

    Calls are sent at once and answered in order, so the process never waits for the parent between
    two of them. The deadline of a call begins when the process comes to it. Missing it, the process
    and all that it started are killed: the call fails with :class:`WorkerHung`, those behind it
    with :class:`WorkerLost`. When it is stuck in a call for as long as the patience of one behind
    it, that one fails with :class:`WorkerBusy`, if there is another process to go to; the process
    will do it all the same, and its answer is ignored.

    Args:
        hello: first message, see :mod:`skyrl_async.environments.worker`.
        startup_timeout_s: from here until the process is ready.
        has_room_elsewhere: says whether another process could take calls.
        burying: holds a task until a dead process has been reaped.

    Raises:
        OSError: if no process can be started.
    """

    def __init__(
        self,
        hello: Mapping[str, Any],
        *,
        startup_timeout_s: float,
        has_room_elsewhere: Callable[[], bool],
        burying: set[asyncio.Task[None]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._burying = burying
        self._has_room_elsewhere = has_room_elsewhere
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(os.getpid()), "\n".join(sys.path)],
                stdin=theirs.fileno(),
                stdout=2,
                # Its own process group: Ctrl-C does not reach it, and killing reaches its children.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.alive = True
        self.num_sessions = 0
        self._startup_timeout_s = startup_timeout_s
        self._why = ""
        self._idle = True
        self.ready = False
        self._calls: deque[_Call] = deque()
        self._head_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._sending = False
        self._loop.add_reader(self._socket, self._receive)
        self.call(hello, timeout_s=startup_timeout_s).add_done_callback(self._started)

    @property
    def num_waiting(self) -> int:
        """Calls sent and not answered."""
        return len(self._calls)

    @property
    def stuck(self) -> bool:
        """Whether it has been doing one call for long."""
        return self.ready and bool(self._calls) and self._running_s() >= STUCK_AFTER_S

    def call(
        self, message: Any, *, timeout_s: float, patience_s: float = math.inf
    ) -> asyncio.Future[Any]:
        """Send a message; the future is its answer.

        Args:
            message: what can be written as JSON.
            timeout_s: for the process to do it.
            patience_s: with one call before it; at least ``STUCK_AFTER_S``.

        Raises:
            WorkerLost: if the process has ended. The future raises it too, or one of the other
                exceptions of this module.
        """
        if not self.alive:
            raise WorkerLost(self._why)
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._outgoing += encoded(message)
        self._calls.append(_Call(answer, timeout_s, patience_s))
        if len(self._calls) == 1:
            self._idle = True
        if not self._sending:
            # Later in this iteration of the loop, so that one write carries many calls.
            self._sending = True
            self._loop.call_soon(self._send)
        return answer

    def kill(self, why: str) -> None:
        """Kill the process; all its calls raise :class:`WorkerLost`."""
        self._end(why, WorkerLost, WorkerLost)

    def _send(self) -> None:
        if not self.alive:
            return
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._send)
        except OSError:
            self._outgoing.clear()  # the reader learns that the process ended
        if not self._outgoing:
            self._sending = False
            self._loop.remove_writer(self._socket)
        if self._idle:
            self._idle = False
            self._head_since_s = self._loop.time()
            self._set_timer()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end("ended", WorkerDied, WorkerLost if self.ready else WorkerStartFailed)
            return
        self._incoming += data
        if b"\n" not in data:
            return
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = rest
        for line in lines:
            try:
                value = json.loads(line)
                call = self._calls.popleft()
            except (ValueError, IndexError):
                self._end("wrote to its own connection and ended", WorkerDied, WorkerLost)
                return
            if not call.answer.done():
                call.answer.set_result(value)
        self._head_since_s = self._loop.time()
        self._set_timer()

    def _running_s(self) -> float:
        """Return how long the oldest call has been with the process."""
        return 0.0 if self._idle else self._loop.time() - self._head_since_s

    def _set_timer(self) -> None:
        """Have the calls checked soon, and not later than at the deadline of the oldest."""
        if not self._calls:
            return
        now_s = self._loop.time()
        due_s = min(self._head_since_s + self._calls[0].timeout_s, now_s + _CHECK_EVERY_S)
        if self._timer is not None:
            if self._timer.when() <= due_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._check)

    def _check(self) -> None:
        self._timer = None
        self._receive()  # an answer may have come while the loop was busy
        if not self.alive or not self._calls:
            return
        running_s = self._running_s()
        if running_s < self._calls[0].timeout_s:
            if self.stuck:
                self._give_back(running_s)
            self._set_timer()
        elif self.ready:
            self._end("was killed because another episode hung", WorkerHung, WorkerLost)
        else:
            why = f"was not ready after {self._startup_timeout_s} s and was killed"
            self._end(why, WorkerHung, WorkerStartFailed)

    def _give_back(self, running_s: float) -> None:
        """Fail the calls that have lost their patience with the oldest one."""
        if not self._has_room_elsewhere():
            return
        for call in itertools.islice(self._calls, 1, None):
            if call.patience_s <= running_s and not call.answer.done():
                call.answer.set_exception(WorkerBusy())

    def _started(self, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return
        if answer.exception() is None:
            if answer.result() == "ready":
                self.ready = True
            else:
                why = f"could not start: {answer.result()['detail']}"
                self._end(why, WorkerStartFailed, WorkerStartFailed)

    def _end(self, why: str, oldest: type[Exception], others: type[Exception]) -> None:
        """Kill the process; its oldest call raises ``oldest``, those behind it ``others``."""
        if not self.alive:
            return
        self.alive = False
        self._why = why
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._socket.close()
        task = self._loop.create_task(self._bury(oldest, others))
        self._burying.add(task)
        task.add_done_callback(self._burying.discard)

    async def _bury(self, oldest: type[Exception], others: type[Exception]) -> None:
        """Reap the process and fail its calls."""
        try:
            code = await asyncio.to_thread(self._process.wait, EXIT_TIMEOUT_S)
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"SIGKILL, but was still there after {EXIT_TIMEOUT_S} s"
        if oldest is WorkerDied:
            self._why += f" with {how}"
        for index, call in enumerate(self._calls):
            if not call.answer.done():
                call.answer.set_exception((others if index else oldest)(self._why))
                call.answer.exception()  # nobody need wait for it
        self._calls.clear()
