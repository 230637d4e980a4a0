"""Fakes of what surrounds the code under test; each refuses what the real part would refuse.

They wait for events, never for time, and write what happened into lists that tests compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyrl_async.environments.outcomes import StepOutcome
from skyrl_async.rollout.engine_client import EngineStats
from skyrl_async.types import (
    Assignment,
    DroppedGroup,
    EvaluationResult,
    FinishReason,
    Generation,
    RolloutReport,
    SampledBatch,
    Sampling,
    StepResult,
    Task,
    TrajectoryGroup,
)
from tests.records import make_trajectory, make_turn

Event = tuple[Any, ...]


class FakeClock:
    """Seconds that only go on when told."""

    def __init__(self, now: float = 50.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ListSink:
    """Keeps the metrics of every step; refuses what a file could not hold."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, step, *, metrics, histograms) -> None:
        json.dumps(metrics, allow_nan=False)
        assert metrics["step"] == step
        self.lines.append({**metrics, **histograms})

    def close(self) -> None:
        pass


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


Answer = str | StepOutcome | Exception | Callable[[], Awaitable[Any]]
"""What a session answers: a value, an error to raise, or a coroutine function of the value."""


def outcome(
    observation: str = "higher",
    *,
    reward: float = 0.0,
    terminated: bool = False,
    truncated: bool = False,
) -> StepOutcome:
    return StepOutcome(observation, reward, terminated, truncated)


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


def two_member_group(assignment: Assignment, version: int) -> TrajectoryGroup:
    """Return a finished group of ``assignment``: two tokens each, rewards 0 and 1."""
    return TrajectoryGroup(
        group_id=assignment.group_id,
        task_id=assignment.task.task_id,
        trajectories=tuple(
            make_trajectory(make_turn([1, 2], [3, 4], version=version), reward=reward)
            for reward in (0.0, 1.0)
        ),
    )


Finish = Callable[[Assignment, int], TrajectoryGroup | DroppedGroup | None]


class FakeRolloutWorker:
    """Reports at most one group per poll, as ``finish`` makes it; None leaves it in flight.

    Args:
        name: in the events.
        events: shared list; gets ``("submit", name, group_id)``, ``("report", name, group_id)``,
            ``("live", name, version)`` and ``("evaluate", name, version)``.
        finish: makes the group, given the version that the engine has.
        polls_before_live: empty reports of the old version after a publish.
        evaluate: called with the tasks, returns the mean reward.
    """

    def __init__(
        self,
        name: str,
        events: list[Event],
        *,
        finish: Finish = two_member_group,
        polls_before_live: int = 0,
        evaluate: Callable[[int], Awaitable[float]] | None = None,
    ) -> None:
        self.name = name
        self.version = 0
        self.polling = False
        self.in_flight: dict[int, Assignment] = {}
        self.most_in_flight = 0
        self.on_submit: Callable[[], Awaitable[None]] | None = None
        self.on_poll: Callable[[], Awaitable[None]] | None = None
        self._events = events
        self._finish = finish
        self._polls_before_live = polls_before_live
        self._evaluate = evaluate
        self._published: list[tuple[int, int]] = []  # (polls to wait, version)
        self._seen: set[int] = set()
        self._news = asyncio.Event()

    def publish(self, version: int) -> None:
        """Make a version available; the newest wins."""
        assert version > self.version
        self._published = [(self._polls_before_live, version)]
        self._news.set()

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        assert assignments, "nothing to play"
        for assignment in assignments:
            assert assignment.group_id not in self._seen, "a group is played once"
            self._seen.add(assignment.group_id)
            self.in_flight[assignment.group_id] = assignment
            self._events.append(("submit", self.name, assignment.group_id))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self._news.set()
        if self.on_submit is not None:
            await self.on_submit()

    async def poll(self, *, wait_s: float) -> RolloutReport:
        assert not self.polling and wait_s > 0
        self.polling = True
        try:
            if self.on_poll is not None:
                await self.on_poll()
            report = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while report is None:
                        self._news.clear()
                        await asyncio.sleep(0)
                        if (report := self._next_report()) is None:
                            await self._news.wait()
            return report or self._report()
        finally:
            self.polling = False

    async def evaluate(self, tasks: Sequence[Task]) -> EvaluationResult:
        assert tasks and all(isinstance(task, Task) for task in tasks)
        assert self._evaluate is not None, "no evaluation was expected"
        version = self.version
        self._events.append(("evaluate", self.name, version))
        reward = await self._evaluate(version)
        return EvaluationResult(
            policy_version=version, mean_reward=reward, num_tasks=len(tasks), num_failures=0
        )

    def _next_report(self) -> RolloutReport | None:
        if self._published:
            polls, version = self._published.pop()
            if polls:
                self._published = [(polls - 1, version)]
                return self._report()
            self.version = version
            self._events.append(("live", self.name, version))
            return self._report()
        for group_id, assignment in self.in_flight.items():
            group = self._finish(assignment, self.version)
            if group is not None:
                assert group.group_id == group_id
                del self.in_flight[group_id]
                self._events.append(("report", self.name, group_id))
                return self._report(group)
        return None

    def _report(self, *groups: TrajectoryGroup | DroppedGroup) -> RolloutReport:
        tokens = sum(group.num_generated_tokens for group in groups)
        return RolloutReport(
            engine_version=self.version, groups=groups, counts={"generated_tokens": tokens}
        )


class FakeLearner:
    """Checks every batch against the bound and publishes to the workers without waiting for them.

    Args:
        workers: get every version that a step makes.
        events: shared list; gets ``("step", version)`` and ``("trained", version)``.
        groups_per_step: size of each batch.
        max_staleness: of the tokens that a batch may train.
        skip: number of a step, from 1, to whether its gradient is not finite.
        during: called in each step with its number, before it ends.
        report: number of a step, from 1, to further metrics of it.
    """

    def __init__(
        self,
        workers: Sequence[FakeRolloutWorker],
        events: list[Event],
        *,
        groups_per_step: int,
        max_staleness: int,
        skip: Callable[[int], bool] = lambda step: False,
        during: Callable[[int], Awaitable[None]] | None = None,
        report: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        self.version = 0
        self.steps = 0
        self.rate = 1.0
        self._remembered: int | None = None
        self._report = report
        self.stepping = False
        self._workers = workers
        self._events = events
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._skip = skip
        self._during = during
        self._trained: set[int] = set()

    async def step(self, batch: SampledBatch) -> StepResult:
        assert not self.stepping, "one step at a time"
        self.stepping = True
        try:
            counts = self._check(batch)
            self.steps += 1
            self._events.append(("step", self.version))
            await (asyncio.sleep(0) if self._during is None else self._during(self.steps))
        finally:
            self.stepping = False
        metrics = {"optimizer_steps": 2.0 * self.steps, **self._report(self.steps)}
        if self._skip(self.steps):
            return StepResult(
                policy_version=self.version, skipped=True, metrics=metrics, staleness_counts={}
            )
        self.version += 1
        for worker in self._workers:
            worker.publish(self.version)
        self._events.append(("trained", self.version))
        return StepResult(
            policy_version=self.version, skipped=False, metrics=metrics, staleness_counts=counts
        )

    async def remember(self) -> None:
        assert not self.stepping
        self._remembered = self.version
        self._events.append(("remembered", self.version))

    async def roll_back(self) -> int:
        assert not self.stepping and self._remembered is not None
        self.version += 1
        for worker in self._workers:
            worker.publish(self.version)
        self._events.append(("rolled back", self._remembered, self.version))
        return self.version

    async def scale_rate(self, factor: float) -> None:
        assert 0 < factor < 1
        self.rate *= factor

    def _check(self, batch: SampledBatch) -> Counter[int]:
        assert batch.train_version == self.version
        assert len(batch.groups) == self._groups_per_step
        cut_off = max(0, self.version - self._max_staleness)
        counts: Counter[int] = Counter()
        for sampled in batch.groups:
            assert sampled.min_trainable_version >= cut_off, "a bound may only be tightened"
            assert sampled.group.group_id not in self._trained, "a group is trained once"
            self._trained.add(sampled.group.group_id)
            for trajectory in sampled.group.trajectories:
                versions = trajectory.policy_versions[trajectory.sampled].tolist()
                counts.update(self.version - v for v in versions if v >= cut_off)
        assert counts and min(counts) >= 0, "tokens cannot be newer than the step that trains them"
        return counts
