"""The rollout actor: many groups in flight on one asyncio loop, never waiting for the learner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.metrics.trace import NULL_TRACER, Tracing
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_client import EngineClient, EngineStats
from skyrl_async.rollout.episode import EpisodeLimits, Sessions, play
from skyrl_async.rollout.group import play_group
from skyrl_async.rollout.slots import Slot, Slots
from skyrl_async.types import (
    Assignment,
    DroppedGroup,
    EvaluationResult,
    RolloutReport,
    Sampling,
    Task,
    Trajectory,
    TrajectoryGroup,
)


class Engine(EngineClient, Protocol):
    """An engine of this process: it has to be run, and knows where its time goes."""

    async def run(self) -> None:
        """Generate until cancelled."""
        ...

    def take_stats(self) -> EngineStats:
        """Return what it did since the last call."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How an actor plays.

    Attributes:
        group_size: trajectories per task.
        sampling: of training replies.
        limits: of each episode.
        report_interval_s: reports are at least this far apart, so that they carry many groups.
        num_drawn_slots: slots on the timeline.
    """

    group_size: int
    sampling: Sampling
    limits: EpisodeLimits
    report_interval_s: float = 0.01
    num_drawn_slots: int = 16


class RolloutActor:
    """Plays the groups that it is given and reports what becomes of each.

    ::

        actor = RolloutActor(...)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(actor.run())
            actor.submit([Assignment(group_id=0, task=task)])
            while True:
                report = await actor.poll(wait_s=1.0)

    Args:
        engine: generates; :meth:`run` runs it.
        evaluation_engine: makes another engine, pinned to the weights that ``engine`` has now, or
            around the server at an endpoint.
        sessions: opens environments.
        chat: of the policy's tokenizer.
        settings: how to play.
        clock: seconds, monotonic.
        tracer: gets a lane for each of the first slots.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        evaluation_engine: Callable[[EngineEndpoint | None], Engine],
        sessions: Sessions,
        chat: Chat,
        settings: RolloutSettings,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracing = NULL_TRACER,
    ) -> None:
        self._engine = engine
        self._evaluation_engine = evaluation_engine
        self._sessions = sessions
        self._chat = chat
        self._settings = settings
        self._clock = clock
        self._slots = Slots(tracer=tracer, num_drawn=settings.num_drawn_slots, clock=clock)
        self._finished: list[TrajectoryGroup | DroppedGroup] = []
        self._news = asyncio.Event()
        self._groups: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._last_report_s = -float("inf")

    async def run(self) -> None:
        """Run the engine until cancelled; its failure ends the actor."""
        try:
            await self._engine.run()
        except Exception as error:
            self._fail(error)
            raise

    def submit(self, assignments: Sequence[Assignment]) -> None:
        """Start to play; returns at once."""
        for assignment in assignments:
            task = asyncio.create_task(self._play(assignment))
            self._groups.add(task)
            task.add_done_callback(self._group_done)

    def engine_swapped(self) -> None:
        """Tell the actor that its engine has new weights, so that it reports them soon."""
        self._news.set()

    async def poll(self, *, wait_s: float) -> RolloutReport:
        """Return what happened since the last report, or nothing new after ``wait_s`` seconds.

        Raises:
            RuntimeError: if the engine or a group failed, and not because of the environment.
        """
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
                early = self._last_report_s + self._settings.report_interval_s - self._clock()
                if early > 0:
                    await asyncio.sleep(early)
        except TimeoutError:
            pass
        if self._error is not None:
            raise RuntimeError(f"rollout actor: {self._error!r}") from self._error
        self._news.clear()
        self._last_report_s = self._clock()
        groups, self._finished = tuple(self._finished), []
        stats = self._engine.take_stats()
        return _report(self._engine.policy_version, groups, stats, self._slots.take())

    async def evaluate(
        self, tasks: Sequence[Task], *, endpoint: EngineEndpoint | None = None
    ) -> EvaluationResult:
        """Play ``tasks`` greedily with pinned weights.

        An engine of its own plays them, so that training goes on generating and swapping.

        Args:
            tasks: to play.
            endpoint: server that nothing is loaded into meanwhile; None for the weights that this
                actor's engine has now.

        Raises:
            RuntimeError: if that engine failed.
        """
        engine = self._evaluation_engine(endpoint)
        greedy = replace(self._settings.sampling, temperature=0.0)
        runner = asyncio.create_task(engine.run())
        plays = asyncio.gather(
            *(
                play(
                    task,
                    episode_id=f"evaluation-{index}",
                    sessions=self._sessions,
                    engine=engine,
                    chat=self._chat,
                    sampling=greedy,
                    limits=self._settings.limits,
                )
                for index, task in enumerate(tasks)
            ),
            return_exceptions=True,
        )
        both: set[asyncio.Future[Any]] = {runner, plays}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if runner.done():
                raise RuntimeError(f"evaluation engine: {runner.exception()!r}")
            results = plays.result()
        finally:
            for future in both:
                future.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        rewards = [r.reward for r in results if isinstance(r, Trajectory)]
        for result in results:
            if not isinstance(result, Trajectory | EnvironmentFailure):
                raise result
        return EvaluationResult(
            policy_version=engine.policy_version,
            mean_reward=sum(rewards) / len(tasks),
            num_tasks=len(tasks),
            num_failures=len(tasks) - len(rewards),
        )

    async def close(self) -> None:
        """Stop all groups; what they had is lost."""
        groups = list(self._groups)
        for task in groups:
            task.cancel()
        await asyncio.gather(*groups, return_exceptions=True)

    async def _play(self, assignment: Assignment) -> None:
        group_size = self._settings.group_size
        slots = [self._slots.open() for _ in range(group_size)]

        def play_member(assignment: Assignment, member: int) -> Coroutine[Any, Any, Trajectory]:
            return self._play_member(assignment, member, slots[member])

        try:
            group = await play_group(assignment, group_size=group_size, play_member=play_member)
        finally:
            for slot in slots:
                slot.close()
        self._finished.append(group)
        self._news.set()

    async def _play_member(self, assignment: Assignment, member: int, slot: Slot) -> Trajectory:
        try:
            return await play(
                assignment.task,
                episode_id=f"{assignment.group_id}-{member}",
                sessions=self._sessions,
                engine=self._engine,
                chat=self._chat,
                sampling=self._settings.sampling,
                limits=self._settings.limits,
                clock=slot,
            )
        finally:
            slot.ends()

    def _group_done(self, task: asyncio.Task[None]) -> None:
        self._groups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._news.set()


def _report(
    version: int,
    groups: tuple[TrajectoryGroup | DroppedGroup, ...],
    stats: EngineStats,
    seconds: Mapping[str, float],
) -> RolloutReport:
    """Say what happened, and where the time of the engine and of the slots went."""
    generating = stats.busy_s - stats.swap_stall_s
    return RolloutReport(
        engine_version=version,
        groups=groups,
        seconds=seconds,
        engine_seconds={
            "generate": generating,
            "swap": stats.swap_stall_s,
            "wait_episodes": stats.yielded_s,
            "idle": stats.idle_s,
        },
        counts={
            "generated_tokens": stats.generated_tokens,
            "prefilled_tokens": stats.prefilled_tokens,
            "reprefilled_tokens": stats.reprefilled_tokens,
            "decode_steps": stats.decode_steps,
            "swap_stall_s": stats.swap_stall_s,
        },
        maxima={
            "longest_gap_s": stats.longest_gap_s,
            "longest_gap_decode_steps": stats.longest_gap_decode_steps,
        },
    )
