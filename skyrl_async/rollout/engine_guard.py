"""Starts one server, and sees to it that nothing of the server outlives whoever asked for it.

A program of its own, on the standard library alone. Orders come on standard input and events go to
standard output, one JSON object a line::

    {"order": "start", "command": [...], "keys": {"api-key": "..."}, "log_path": "..."}
    {"order": "forget_keys"}
    {"order": "stop", "timeout_s": 5}

    {"event": "started", "pid": 4242, "key_folder": "..."}
    {"event": "exited", "returncode": -9, "lines": ["..."]}
    {"event": "refused", "reason": "..."}

The keys travel to the server in a YAML file that only its owner can read, named behind
``--config`` at the end of the command and deleted on ``forget_keys`` or when the server has ended.
They are replaced by ``***`` in all that the server writes.

The server's processes are killed when standard input ends or the parent process is another one,
whichever way that happened; after ``timeout_s`` of a stop; and a few seconds after a SIGTERM. If
this program itself is killed, the kernel kills the server.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

TICK_S = 0.1
SIGNAL_GRACE_S = 5.0
"""Between SIGTERM or its like to this program, and SIGKILL to the server."""

SWEEP_TIMEOUT_S = 10.0
"""For killed processes to vanish; one that hangs in the kernel is given up."""

MAX_LOG_BYTES = 64 << 20
"""A longer log is renamed to ``*.1``, in place of an older one, and begun again."""

_LAST_LINES = 60
_MAX_LINE_CHARS = 400
_MAX_PENDING_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class ServerLog:
    """What a server writes, without its secrets.

    Args:
        path: appended to; readable by its owner alone.
        secrets: never written.
    """

    def __init__(self, path: Path, secrets: list[bytes]) -> None:
        self._path = path
        self._secrets = secrets
        self._pending = b""
        self._open()
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    def write(self, data: bytes) -> None:
        """Take the next bytes, whole lines or not."""
        pending = self._pending + data
        for secret in self._secrets:
            pending = pending.replace(secret, b"***")
        end = pending.rfind(b"\n") + 1
        if not end and len(pending) > _MAX_PENDING_BYTES:
            # The beginning of a secret may stand at the very end.
            end = len(pending) - max(map(len, self._secrets), default=0)
        self._pending = pending[end:]
        self._put(pending[:end])

    def close(self) -> None:
        """Write an unfinished line too."""
        self._put(self._pending)
        self._pending = b""
        os.close(self._fd)

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(self._fd, 0o600)
        self._size_bytes = os.fstat(self._fd).st_size

    def _put(self, data: bytes) -> None:
        if self._size_bytes + len(data) > MAX_LOG_BYTES and self._size_bytes:
            os.close(self._fd)
            os.replace(self._path, f"{self._path}.1")
            self._open()
        self._size_bytes += len(data)
        with suppress(OSError):  # A full disk must not end the server.
            os.write(self._fd, data)
        for line in data.decode(errors="replace").splitlines():
            if line.strip():
                self.last_lines.append(line.rstrip()[:_MAX_LINE_CHARS])


class KeyFile:
    """The keys, in a file that only its owner can read.

    Args:
        keys: by the name of their command line flag, without dashes.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="engine-keys-")
        self.path = os.path.join(self.folder, "keys.yaml")
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.writelines(f"{name}: {json.dumps(key)}\n" for name, key in keys.items())

    def delete(self) -> None:
        """Delete it, also when it is gone already."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Guard:
    """One server from its start to the end of its last process.

    Args:
        order: the ``start`` order.
        parent_pid: of the process that gives the orders.

    Raises:
        OSError: if the log or the server cannot be opened.
    """

    def __init__(self, order: Mapping[str, Any], *, parent_pid: int) -> None:
        keys = dict(order["keys"])
        self._parent_pid = parent_pid
        self._orders = b""
        self._kill_at_s: float | None = None
        self._log = ServerLog(Path(order["log_path"]), [key.encode() for key in keys.values()])
        self._keys = KeyFile(keys)
        try:
            self._server = subprocess.Popen(
                [*order["command"], "--config", self._keys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except BaseException:
            self._keys.delete()
            raise
        assert self._server.stdout is not None
        self._output_fd = self._server.stdout.fileno()
        os.set_blocking(self._output_fd, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output_fd, selectors.EVENT_READ, self._read_output)
        self._selector.register(0, selectors.EVENT_READ, self._read_orders)

    def run(self) -> None:
        """Follow orders until the server has ended, and report that."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._terminate(SIGNAL_GRACE_S))
        _emit(event="started", pid=self._server.pid, key_folder=self._keys.folder)
        while not self._ended():
            for key, _ in self._selector.select(TICK_S):
                key.data()
            if os.getppid() != self._parent_pid:
                self._kill()
            if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
                self._kill()
        self._sweep()
        self._keys.delete()
        self._read_output()
        self._log.close()
        returncode = self._server.wait()
        _emit(event="exited", returncode=returncode, lines=list(self._log.last_lines))

    def _ended(self) -> bool:
        # Not reaped yet, so that the number of its process group stays its own until the sweep.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._server.pid, flags) is not None

    def _read_output(self) -> None:
        with suppress(BlockingIOError):
            while data := os.read(self._output_fd, _READ_BYTES):
                self._log.write(data)
            if self._output_fd in self._selector.get_map():
                self._selector.unregister(self._output_fd)

    def _read_orders(self) -> None:
        data = os.read(0, _READ_BYTES)
        if not data:
            self._selector.unregister(0)
            self._kill()
        *lines, self._orders = (self._orders + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if order["order"] == "forget_keys":
                self._keys.delete()
            elif order["order"] == "stop":
                self._terminate(order["timeout_s"])

    def _terminate(self, timeout_s: float) -> None:
        # The first process alone: it ends its children after the requests that they still have.
        with suppress(ProcessLookupError):
            self._server.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + timeout_s
        self._kill_at_s = min(deadline_s, self._kill_at_s or deadline_s)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)

    def _sweep(self) -> None:
        """Kill and reap what the server left, whatever process group it moved to."""
        deadline_s = time.monotonic() + SWEEP_TIMEOUT_S
        self._kill()
        while left := [pid for pid in _children() if pid != self._server.pid]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() >= deadline_s:
                return
            time.sleep(0.02)


def _children() -> Iterator[int]:
    """Yield the processes whose parent is this one; orphans of the server are among them."""
    me = str(os.getpid())
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name, in parentheses, may hold anything; state and parent follow it.
            after_name = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if after_name[1] == me:
                yield int(folder.name)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _emit(**event: Any) -> None:
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(event).encode() + b"\n")


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def main() -> int:
    """Run the guard; the argument is the process that must live for the server to live."""
    parent_pid = int(sys.argv[1])
    line = _first_line()
    if not line.endswith(b"\n"):
        return 1
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        guard = Guard(json.loads(line), parent_pid=parent_pid)
    except OSError as error:
        _emit(event="refused", reason=str(error))
        return 1
    guard.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
