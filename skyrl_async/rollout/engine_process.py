"""One SGLang server as a process of ours: started with keys, checked, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from dataclasses import dataclass, field, replace

import aiohttp

from skyrl_async.rollout.engine_launch import (
    EngineStartError,
    ServerSettings,
    check_version,
    free_port,
    server_command,
    server_environment,
)
from skyrl_async.rollout.guarded_process import ExitReport, GuardedProcess

__all__ = ["EngineProcess", "EngineStartError", "ExitReport", "RunningServer", "ServerSettings"]

_PORT_ATTEMPTS = 3
_POLL_INTERVAL_S = 0.2
_KILL_TIMEOUT_S = 1.0
_KEY_BYTES = 24
_SHOWN_LINES = 20
_PORT_TAKEN = re.compile(r"address already in use|errno 98\b|port \d+ is in use", re.IGNORECASE)
# Lines that SGLang writes after the one that says what went wrong.
_NOISE = re.compile(r"kill_process_tree called|warnings\.warn|UserWarning|^\s*\^+\s*$|^Killed$")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: ``http://HOST:PORT``.
        api_key: for generation. SGLang shows the admin key to whoever asks ``/server_info`` with
            this one, so both are for trusted code alone, never for environments or tools.
        admin_key: for weights and control; it does not allow generation.
        pid: of its first process, which leads the process group of all of them.
        sglang_version: of the interpreter that runs it.
    """

    url: str
    api_key: str = field(repr=False)
    admin_key: str = field(repr=False)
    pid: int
    sglang_version: str


class EngineProcess:
    """One start of one server; all calls belong to one event loop.

    ::

        engine = EngineProcess(settings)
        server = await engine.start()
        report = await engine.wait()              # or
        report = await engine.stop(timeout_s=10)

    Every start has keys of its own. They reach the server in a file that only its owner can read
    and that is deleted once the server answers; neither command lines nor the log have them.
    Whatever happens to this process, all processes of the server end within a second, see
    :mod:`skyrl_async.rollout.engine_guard`.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: GuardedProcess | None = None
        self._started = False

    async def start(self) -> RunningServer:
        """Start the server and return when it answers.

        Raises:
            EngineStartError: if it cannot be started, ends, or does not answer in time; the message
                has the last lines of its log. No process of it is left then.
            RuntimeError: if it was started before.
        """
        if self._started:
            raise RuntimeError("start() was called before; make a new EngineProcess")
        self._started = True
        version = await check_version(self._settings)
        deadline_s = asyncio.get_running_loop().time() + self._settings.start_timeout_s
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = self._settings.port or free_port(self._settings.host)
            try:
                return await self._start_on(port, version=version, deadline_s=deadline_s)
            except EngineStartError as error:
                taken = any(_PORT_TAKEN.search(line) for line in error.last_lines)
                if not taken or self._settings.port or attempt == _PORT_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returned or raised")

    async def stop(self, *, timeout_s: float) -> ExitReport:
        """End the server; return when none of its processes is left.

        Args:
            timeout_s: for it to finish its requests, before it is killed. SGLang looks every five
                seconds whether it was asked to end.

        Raises:
            TimeoutError: if a killed process does not vanish.
        """
        report = await self._running().stop(timeout_s=timeout_s)
        return replace(report, last_lines=meaningful(report.last_lines))

    async def wait(self) -> ExitReport:
        """Return when the server has ended and none of its processes is left."""
        report = await self._running().wait()
        return replace(report, last_lines=meaningful(report.last_lines))

    def _running(self) -> GuardedProcess:
        if self._process is None:
            raise RuntimeError("start() the server first")
        return self._process

    async def _start_on(self, port: int, *, version: str, deadline_s: float) -> RunningServer:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        api_key, admin_key = secrets.token_hex(_KEY_BYTES), secrets.token_hex(_KEY_BYTES)
        process = GuardedProcess(
            server_command(settings, port=port),
            environment=server_environment(settings),
            keys={"api-key": api_key, "admin-api-key": admin_key},
            log_path=settings.log_path,
        )
        try:
            pid = await process.launch()
        except OSError as error:
            raise EngineStartError(f"cannot start {settings.python}: {error}") from None
        self._process = process
        server = RunningServer(
            url=f"http://{host}:{port}",
            api_key=api_key,
            admin_key=admin_key,
            pid=pid,
            sglang_version=version,
        )
        try:
            await self._until_ready(server, process, deadline_s=deadline_s)
        except EngineStartError:
            raise
        except BaseException:
            await process.kill()
            raise
        process.forget_keys()
        return server

    async def _until_ready(
        self, server: RunningServer, process: GuardedProcess, *, deadline_s: float
    ) -> None:
        ended = asyncio.create_task(process.wait())
        ready = asyncio.create_task(_answers(server))
        try:
            left_s = deadline_s - asyncio.get_running_loop().time()
            await asyncio.wait({ended, ready}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ended.done():
                return ready.result()
            if ended.done():
                report = ended.result()
                problem = f"ended with return code {report.returncode} before it answered"
            else:
                report = await process.stop(timeout_s=_KILL_TIMEOUT_S)
                problem = f"did not answer within {self._settings.start_timeout_s:g} s"
        finally:
            for task in (ended, ready):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({task})
        raise EngineStartError(
            f"the SGLang server at {server.url} {problem}; log: {self._settings.log_path}",
            last_lines=meaningful(report.last_lines),
        )


async def probe(server: RunningServer, *, timeout_s: float) -> None:
    """Return when the schedulers of a server have answered a question.

    ``/server_info`` asks every scheduler and is answered also while generation is paused. It
    neither samples a token nor sleeps, as ``/health`` does.

    Raises:
        OSError: if the server could not be reached, or refused.
        TimeoutError: if it did not answer in time.
    """
    limit = aiohttp.ClientTimeout(total=timeout_s)
    headers = {"Authorization": f"Bearer {server.api_key}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers) as session,
            session.get(f"{server.url}/server_info") as reply,
        ):
            await reply.read()
            if reply.status != 200:
                raise OSError(f"{server.url}/server_info answered {reply.status}")
    except aiohttp.ClientError as error:
        raise OSError(f"{server.url} cannot be reached: {error}") from None


async def _answers(server: RunningServer) -> None:
    """Return when ``/health`` says so, and the keys show that it is this server that answers."""
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                with_key = await _status(session, f"{server.url}/model_info", headers)
                without_key = await _status(session, f"{server.url}/model_info", {})
                if (with_key, without_key) == (200, 401):
                    health = await _status(session, f"{server.url}/health", {})
                    if health == 200:
                        return
            await asyncio.sleep(_POLL_INTERVAL_S)


async def _status(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> int:
    async with session.get(url, headers=headers) as reply:
        return reply.status


def meaningful(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last lines of a log that say something about its end."""
    return tuple(line for line in lines if not _NOISE.search(line))[-_SHOWN_LINES:]
