"""A fake engine and fake environments, which refuse what the real ones would refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyrl_async.environments.outcomes import StepOutcome
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.types import (
    FinishReason,
    Generation,
    Sampling,
    Task,
)


@dataclass(frozen=True)
class Call:
    """One request to a :class:`FakeEngine`, and what it answered."""

    context: tuple[int, ...]
    sampling: Sampling
    request_id: str
    session_id: str
    generation: Generation | None = field(default=None, compare=False)


class FakeEngine:
    """Answers with the token ids that ``reply`` gives for a request, cut to ``max_tokens``.

    Every token gets a logprob of its own, so that a mix-up shows. ``before_reply`` may wait, swap
    or raise. A session must send what it was given before, and then more.
    """

    def __init__(
        self,
        reply: Callable[[Call], Sequence[int]],
        *,
        context_length: int = 64,
        vocab_size: int = 1000,
        policy_version: int = 0,
        before_reply: Callable[[Call], Awaitable[None]] | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.released: list[str] = []
        self.live: dict[str, str] = {}
        self.most_live = 0
        self.running = False
        self.policy_version = policy_version
        self._reply = reply
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._before_reply = before_reply
        self._sessions: dict[str, tuple[int, ...]] = {}
        self._request_ids: set[str] = set()
        self._stop = asyncio.Event()
        self._cause: Exception | None = None
        self._generated = 0

    async def generate(
        self, token_ids, sampling, *, request_id: str, session_id: str | None = None
    ) -> Generation:
        call = Call(tuple(token_ids), sampling, request_id, session_id or "")
        self._check(call)
        self._request_ids.add(request_id)
        self.live[request_id] = call.session_id
        self.most_live = max(self.most_live, len(self.live))
        try:
            await self._wait(call)
        finally:
            del self.live[request_id]
        generation = self._generation(call)
        self._sessions[call.session_id] = (*call.context, *generation.token_ids.tolist())
        self.calls.append(Call(call.context, sampling, request_id, call.session_id, generation))
        return generation

    def release(self, session_id: str) -> None:
        assert session_id not in self.released, f"{session_id} was released twice"
        assert session_id not in self.live.values(), f"{session_id} still has a request"
        self.released.append(session_id)

    def swap(self, policy_version: int) -> None:
        assert policy_version > self.policy_version
        self.policy_version = policy_version

    def die(self, cause: Exception) -> None:
        """End :meth:`run` with ``cause``, and all live requests with another error."""
        self._cause = cause
        self._stop.set()

    async def run(self) -> None:
        assert not self.running and not self._stop.is_set(), "run() can be called once"
        self.running = True
        try:
            await self._stop.wait()
        finally:
            self.running = False
            self._stop.set()
        if self._cause is not None:
            raise self._cause

    def take_stats(self) -> EngineStats:
        generated, self._generated = self._generated, 0
        return EngineStats(
            decode_steps=generated,
            generated_tokens=generated,
            prefilled_tokens=7,
            reprefilled_tokens=3,
            swap_stall_s=0.25,
            longest_gap_s=0.5,
            longest_gap_decode_steps=2.0,
            busy_s=2.0,
            yielded_s=1.0,
            idle_s=1.0,
        )

    def _check(self, call: Call) -> None:
        if self._stop.is_set():
            raise RuntimeError("the engine has stopped and takes no requests")
        room = self._context_length - len(call.context)
        assert call.context and 1 <= call.sampling.max_tokens <= room, (room, call)
        assert all(type(t) is int and 0 <= t < self._vocab_size for t in call.context), call
        assert call.sampling.stop_token_ids, "nothing would end a reply"
        assert call.request_id not in self._request_ids, f"{call.request_id} was used before"
        assert call.session_id and call.session_id not in self.live.values(), call
        assert call.session_id not in self.released, f"{call.session_id} was released"
        before = self._sessions.get(call.session_id, ())
        assert call.context[: len(before)] == before, "a session's context only grows"

    async def _wait(self, call: Call) -> None:
        if self._before_reply is None:
            await asyncio.sleep(0)
            return
        waits = [
            asyncio.ensure_future(self._before_reply(call)),
            asyncio.ensure_future(self._stop.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():
                raise RuntimeError("the engine stopped before the request ended")
            waits[0].result()
        finally:
            for wait in waits:
                wait.cancel()

    def _generation(self, call: Call) -> Generation:
        ids = list(self._reply(call))[: call.sampling.max_tokens]
        stops = call.sampling.stop_token_ids
        assert ids and not set(ids[:-1]) & set(stops), "only the last token can be a stop token"
        first, self._generated = self._generated, self._generated + len(ids)
        return Generation(
            token_ids=np.array(ids, np.int32),
            logprobs=-(1 + np.arange(first, self._generated)) / np.float32(1000),
            policy_versions=np.full(len(ids), self.policy_version, np.int32),
            temperature=call.sampling.temperature or 1.0,
            finish_reason=FinishReason.STOP if ids[-1] in stops else FinishReason.LENGTH,
        )


def outcome(
    observation: str = "higher",
    *,
    reward: float = 0.0,
    terminated: bool = False,
    truncated: bool = False,
) -> StepOutcome:
    return StepOutcome(observation, reward, terminated, truncated)


Answer = str | StepOutcome | Exception | Callable[[], Awaitable[Any]]
"""What a session answers: a value, an error to raise, or a coroutine function of the value."""


class FakeSession:
    """Answers from a list: the first observation, then one outcome for every reply."""

    def __init__(self, first: Answer, *outcomes: Answer) -> None:
        self.replies: list[str] = []
        self.closed = False
        self._answers = [first, *outcomes]
        self._given = 0
        self._busy = False
        self._over = False

    async def reset(self) -> str:
        assert self._given == 0, "a session is reset once"
        return await self._next(str)

    async def step(self, reply: str) -> StepOutcome:
        assert self._given, "step comes after reset"
        assert isinstance(reply, str) and "<end>" not in reply and "<|im_end|>" not in reply
        self.replies.append(reply)
        answer = await self._next(StepOutcome)
        self._over = answer.terminated or answer.truncated
        return answer

    async def close(self) -> None:
        assert not self.closed, "a session is closed once"
        self.closed = True

    async def _next(self, kind: type) -> Any:
        assert not (self.closed or self._over or self._busy), "the session cannot answer"
        assert self._given < len(self._answers), "the session has no further answer"
        answer = self._answers[self._given]
        self._given += 1
        self._busy = True
        try:
            if callable(answer):
                answer = await answer()
        finally:
            self._busy = False
        if isinstance(answer, Exception):
            self._over = True
            raise answer
        assert isinstance(answer, kind), answer
        return answer


class FakeSessions:
    """Opens what ``make`` returns for a task."""

    def __init__(self, make: Callable[[Task], FakeSession]) -> None:
        self.opened: list[FakeSession] = []
        self._make = make

    async def open(self, task: Task) -> FakeSession:
        session = self._make(task)
        self.opened.append(session)
        return session

    @property
    def all_closed(self) -> bool:
        return all(session.closed for session in self.opened)
