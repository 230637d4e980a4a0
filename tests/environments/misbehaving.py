"""Environments that misbehave when their task's extras, or a reply, say so."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal

import numpy as np


def _raise(error):
    raise error


def _busy():
    while True:
        pass


def _ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _busy()


def _recurse():
    return _recurse()


TROUBLES = {
    "raise": lambda: _raise(ValueError("the dice\nfell off")),
    "system_exit": lambda: sys.exit(3),
    "keyboard_interrupt": lambda: _raise(KeyboardInterrupt()),
    "cancelled": lambda: _raise(asyncio.CancelledError()),
    "stop_iteration": lambda: _raise(StopIteration()),
    "memory_error": lambda: _raise(MemoryError()),
    "recursion": _recurse,
    "os_exit": lambda: os._exit(7),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "sleep": lambda: time.sleep(1000),
    "busy": _busy,
    "ignore_sigterm": _ignore_sigterm,
    "none": lambda: None,
}

ANSWERS = {
    "reward_nan": ("x", float("nan"), False, False, {}),
    "reward_inf": ("x", float("inf"), False, False, {}),
    "reward_huge": ("x", 10**400, False, False, {}),
    "reward_numpy_nan": ("x", np.float32("nan"), False, False, {}),
    "reward_none": ("x", None, False, False, {}),
    "reward_str": ("x", "1.0", False, False, {}),
    "reward_complex": ("x", 1j, False, False, {}),
    "reward_decimal": ("x", Decimal("1"), False, False, {}),
    "reward_bool": ("x", True, False, False, {}),
    "reward_numpy": ("x", np.float32(0.5), np.bool_(True), np.bool_(False), {}),
    "four": ("x", 1.0, False, {}),
    "text": "abcde",
    "bytes": (b"x", 1.0, False, False, {}),
    "not_bool": ("x", 1.0, 1, False, {}),
    "info_none": ("x", 1.0, False, False, None),
    "flood": ("x" * 50_000_000, 1.0, False, False, {}),
    "surrogate": ("a\ud800b", 1.0, False, False, {}),
    "surrogate_pair": ("a\ud83d\ude00b", 1.0, False, False, {}),
}


class Troublesome:
    """Repeats replies; three and the episode is over. A reply that names a trouble has it.

    ``extras["reset"]`` names a trouble for reset, the option one for ``__init__``.
    """

    def __init__(self, *, init="", close=""):
        self._close = close
        if init:
            TROUBLES[init]()

    def reset(self, *, seed=None, options=None):
        self._seed = seed
        self._count = 0
        trouble = (options or {}).get("reset")
        if trouble == "flood":
            return "x" * 50_000_000, {}
        if trouble == "bytes":
            return b"x", {}
        if trouble:
            return TROUBLES[trouble]()
        return f"start {seed}", {}

    def step(self, action):
        self._count += 1
        if action in TROUBLES:
            return TROUBLES[action]()
        if action in ANSWERS:
            return ANSWERS[action]
        while action.startswith("wait for ") and not os.path.exists(action[len("wait for ") :]):
            time.sleep(0.01)
        return f"{self._seed} {self._count} {action}", 1.0, self._count == 3, False, {}

    def close(self):
        if self._close:
            TROUBLES[self._close]()


class SaysItsProcess(Troublesome):
    """Is not reproducible: every observation names its process."""

    def reset(self, *, seed=None, options=None):
        return str(os.getpid()), {}

    def step(self, action):
        if action in TROUBLES:
            return TROUBLES[action]()
        return str(os.getpid()), 1.0, False, False, {}


class StartsChildren(SaysItsProcess):
    """A step starts a child process and names it."""

    def step(self, action):
        child = subprocess.Popen(["sleep", "1000"])
        return str(child.pid), 1.0, False, False, {}


class Noisy(Troublesome):
    """Prints on every way there is."""

    def reset(self, *, seed=None, options=None):
        print('["reset", 1]')
        os.write(1, b"raw noise\n")
        os.system("echo child noise")
        sys.stderr.write("error noise\n")
        return super().reset(seed=seed, options=options)


class ReadsInput(Troublesome):
    """Reads standard input, where the messages would be."""

    def step(self, action):
        return repr(sys.stdin.read()), 1.0, True, False, {}


class NoticesClose:
    """Writes a line to a file when it is closed."""

    def __init__(self, *, path):
        self._path = path

    def reset(self, *, seed=None, options=None):
        return str(seed), {}

    def step(self, action):
        return "", 0.0, True, False, {}

    def close(self):
        with open(self._path, "a") as file:
            file.write("closed\n")


class AsyncTroublesome:
    """As Troublesome; ``log`` gets what happens, with the task in which it does."""

    def __init__(self, *, log=None, init=""):
        self._log = [] if log is None else log
        if init:
            TROUBLES[init]()

    def _note(self, what):
        self._log.append((what, asyncio.current_task()))

    async def reset(self, *, seed=None, options=None):
        self._note("reset")
        self._seed = seed
        self._count = 0
        await asyncio.sleep(0)
        if (options or {}).get("reset"):
            TROUBLES[options["reset"]]()
        return f"start {seed}", {}

    async def step(self, action):
        self._note("step")
        self._count += 1
        await asyncio.sleep(0)
        if action == "hang":
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                self._note("cancelled")
                raise
        if action == "swallow":
            await self._swallow(asyncio.CancelledError)
        if action == "swallow_all":
            await self._swallow(BaseException)
        if action == "own_timeouts":
            for _ in range(3):
                try:
                    async with asyncio.timeout(0.001):
                        await asyncio.sleep(1000)
                except TimeoutError:
                    self._note("own timeout")
        if action in TROUBLES:
            TROUBLES[action]()
        if action in ANSWERS:
            return ANSWERS[action]
        return f"{self._seed} {self._count} {action}", 1.0, self._count == 3, False, {}

    async def _swallow(self, errors):
        while True:
            try:
                await asyncio.sleep(1000)
            except errors:
                self._note("swallowed")

    async def close(self):
        await asyncio.sleep(0)
        self._note("closed")


class SwallowsEverywhere(AsyncTroublesome):
    async def close(self):
        self._note("closing")
        await self._swallow(asyncio.CancelledError)
