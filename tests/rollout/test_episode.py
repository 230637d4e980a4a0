from __future__ import annotations

import asyncio

import numpy as np
import pytest

from skyrl_async.environments.base import EnvironmentFailure
from skyrl_async.environments.host import EnvironmentHost
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.episode import EpisodeLimits, play
from skyrl_async.types import DropReason, Sampling, Task, TrajectoryStatus
from tests.rollout.embedded_engine_cases import TOLERANCE, reference_logprobs, running
from tests.rollout.test_chat import byte_level_tokenizer, encode
from tests.rollout_fakes import FakeEngine, FakeSession, FakeSessions, outcome

TOKENIZER = build_tiny_tokenizer()
CHAT = Chat(TOKENIZER)
(STOP,) = CHAT.stop_token_ids
EIGHT, FIVE = encode(TOKENIZER, "8 5")
TASK = Task(task_id="t/0", environment="number_guess", seed=3)
DEADLINE_S = 5.0
FOREVER = 60.0


def never() -> asyncio.Future:
    """Something to wait for that does not come."""
    return asyncio.get_running_loop().create_future()


async def played(
    session: FakeSession,
    engine: FakeEngine,
    *,
    chat: Chat = CHAT,
    task: Task = TASK,
    max_turns: int = 5,
    context_length: int = 64,
    timeout_s: float = FOREVER,
    max_tokens: int = 3,
):
    return await play(
        task,
        episode_id="g-0",
        sessions=FakeSessions(lambda task: session),
        engine=engine,
        chat=chat,
        sampling=Sampling(max_tokens=max_tokens, stop_token_ids=chat.stop_token_ids),
        limits=EpisodeLimits(
            max_turns=max_turns, context_length=context_length, timeout_s=timeout_s
        ),
    )


def run(episode):
    """Run the coroutine that ``episode`` makes, and see that it leaves no task behind."""

    async def body():
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await episode()
            finally:
                await asyncio.sleep(0)  # cancelled waits of the fake engine end here
                assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(body())


def in_order(*replies: list[int]):
    """Reply with one after the other."""
    left = list(replies)
    return lambda call: left.pop(0)


def test_episode_ends_when_the_environment_terminates_it():
    session = FakeSession(
        "guess a number",
        outcome("lower", reward=0.25),
        outcome("higher", reward=-1.0),
        outcome("correct", reward=2.0, terminated=True),
    )
    engine = FakeEngine(in_order([EIGHT, STOP], [FIVE, EIGHT, FIVE], [FIVE, STOP]))

    trajectory = run(lambda: played(session, engine))

    assert trajectory.status is TrajectoryStatus.TERMINATED
    assert (trajectory.reward, trajectory.num_turns) == (1.25, 3)
    assert session.replies == ["8", "5 8 5", "5"]
    assert session.closed and engine.released == ["g-0"] and not engine.live


def test_environment_truncates():
    session = FakeSession("guess", outcome(), outcome(reward=0.5, truncated=True))
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    trajectory = run(lambda: played(session, engine))

    assert trajectory.status is TrajectoryStatus.TRUNCATED
    assert (trajectory.reward, trajectory.num_turns) == (0.5, 2)


def test_termination_wins_over_every_limit():
    session = FakeSession("guess", outcome(terminated=True, truncated=True))
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    trajectory = run(lambda: played(session, engine, max_turns=1))

    assert trajectory.status is TrajectoryStatus.TERMINATED


def test_turn_limit_truncates_after_the_last_reply_was_scored():
    session = FakeSession("guess", outcome(reward=1.0), outcome(reward=2.0))
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    trajectory = run(lambda: played(session, engine, max_turns=2))

    assert trajectory.status is TrajectoryStatus.TRUNCATED
    assert (trajectory.reward, trajectory.num_turns) == (3.0, 2)


def test_full_context_cuts_the_last_reply_and_truncates():
    session = FakeSession("guess", outcome(reward=1.0), outcome(reward=1.0))
    engine = FakeEngine(lambda call: [EIGHT] * call.sampling.max_tokens, context_length=12)
    prompt, between = CHAT.prompt((), "guess"), CHAT.observation("higher", stopped=False)
    assert (len(prompt), len(between)) == (3, 4)

    trajectory = run(lambda: played(session, engine, context_length=12))

    assert [call.sampling.max_tokens for call in engine.calls] == [3, 2]
    assert trajectory.status is TrajectoryStatus.TRUNCATED
    assert (trajectory.reward, trajectory.num_turns) == (2.0, 2)
    assert trajectory.token_ids.tolist() == [*prompt, *[EIGHT] * 3, *between, *[EIGHT] * 2]
    assert session.closed


def test_prompt_that_fills_the_context_is_a_failure_with_a_remedy():
    session = FakeSession("guess " * 20)
    engine = FakeEngine(lambda call: [EIGHT], context_length=22)

    with pytest.raises(EnvironmentFailure, match=r"22 tokens.*raise engine\.context_length") as e:
        run(lambda: played(session, engine, context_length=22))

    assert e.value.reason is DropReason.OVERLONG_OBSERVATION
    assert engine.calls == [] and session.closed and engine.released == ["g-0"]


def test_trajectory_has_exactly_the_tokens_that_the_engine_got_and_gave():
    """Replies in tokens that the tokenizer itself would not choose stay as they were sampled."""
    tokenizer = byte_level_tokenizer()
    chat = Chat(tokenizer)
    letters = [encode(tokenizer, letter)[0] for letter in "higher"]
    assert encode(tokenizer, "higher") != letters
    replies = [[*letters, *chat.stop_token_ids], letters, [*letters, *chat.stop_token_ids]]
    session = FakeSession("guess", outcome("a"), outcome("b"), outcome(terminated=True))
    engine = FakeEngine(in_order(*replies), context_length=500)

    trajectory = run(lambda: played(session, engine, chat=chat, context_length=500, max_tokens=7))

    assert session.replies == ["higher"] * 3
    generations = [call.generation for call in engine.calls]
    ids = trajectory.token_ids.tolist()
    assert ids == [*engine.calls[-1].context, *replies[-1]]
    sampled = np.zeros(len(ids), bool)
    for call, reply in zip(engine.calls, replies, strict=True):
        start = len(call.context)
        assert ids[:start] == list(call.context) and ids[start : start + len(reply)] == reply
        sampled[start : start + len(reply)] = True
    assert (trajectory.sampled == sampled).all()
    logprobs = np.concatenate([g.logprobs for g in generations])
    assert (trajectory.behavior_logprobs[sampled] == logprobs).all()
    assert (trajectory.behavior_logprobs[~sampled] == 0).all()
    assert (trajectory.policy_versions[~sampled] == -1).all()


def test_every_turn_is_a_request_of_the_same_session():
    session = FakeSession("guess", outcome(), outcome(), outcome(terminated=True))
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    run(lambda: played(session, engine))

    assert [call.request_id for call in engine.calls] == ["g-0/0", "g-0/1", "g-0/2"]
    assert {call.session_id for call in engine.calls} == {"g-0"}


def test_weights_may_change_between_turns():
    async def swap(call):
        if engine.calls:
            engine.swap(3 * len(engine.calls))

    session = FakeSession("guess", outcome(), outcome(), outcome(terminated=True))
    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=swap)

    trajectory = run(lambda: played(session, engine))

    versions = trajectory.policy_versions[trajectory.sampled].tolist()
    assert versions == [0, 0, 3, 3, 6, 6]
    assert (trajectory.min_policy_version, trajectory.max_policy_version) == (0, 6)


@pytest.mark.parametrize("where", ["reset", "step", "generate"])
def test_deadline_of_the_episode_frees_everything(where):
    async def hang(call=None):
        await never()

    session = FakeSession(
        hang if where == "reset" else "guess", hang if where == "step" else outcome()
    )
    engine = FakeEngine(
        lambda call: [EIGHT, STOP], before_reply=hang if where == "generate" else None
    )

    with pytest.raises(EnvironmentFailure, match=r"longer than 0\.02 s") as e:
        run(lambda: played(session, engine, timeout_s=0.02))

    assert e.value.reason is DropReason.EPISODE_TIMEOUT
    assert session.closed and engine.released == ["g-0"] and not engine.live


FAILURE = EnvironmentFailure(DropReason.NONFINITE_REWARD, "t/0: the reward is nan")


@pytest.mark.parametrize(
    ("first", "second"), [(FAILURE, outcome()), ("guess", FAILURE)], ids=["reset", "step"]
)
def test_failure_of_the_environment_frees_everything(first, second):
    session = FakeSession(first, second)
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    with pytest.raises(EnvironmentFailure) as e:
        run(lambda: played(session, engine))

    assert e.value is FAILURE
    assert session.closed and engine.released == ["g-0"]


@pytest.mark.parametrize("error", [RuntimeError("logits"), TimeoutError("the engine's own")])
def test_failure_of_the_engine_is_not_blamed_on_the_environment(error):
    async def fail(call):
        raise error

    session = FakeSession("guess", outcome())
    engine = FakeEngine(lambda call: [EIGHT, STOP], before_reply=fail)

    with pytest.raises(type(error)) as e:
        run(lambda: played(session, engine))

    assert e.value is error
    assert session.closed and engine.released == ["g-0"]


@pytest.mark.parametrize("where", ["reset", "step", "generate"])
def test_cancelled_episode_frees_everything(where):
    async def episode():
        reached = asyncio.Event()

        async def hang(call=None):
            reached.set()
            await never()

        session = FakeSession(
            hang if where == "reset" else "guess", hang if where == "step" else outcome()
        )
        engine = FakeEngine(
            lambda call: [EIGHT, STOP], before_reply=hang if where == "generate" else None
        )
        playing = asyncio.create_task(played(session, engine))
        await reached.wait()
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        assert session.closed and engine.released == ["g-0"] and not engine.live

    run(episode)


def test_environment_that_cannot_be_opened_leaves_the_engine_alone():
    class Closed:
        async def open(self, task):
            raise EnvironmentFailure(DropReason.ENVIRONMENT_ERROR, "no subprocess")

    engine = FakeEngine(lambda call: [EIGHT])

    async def episode():
        await play(
            TASK,
            episode_id="g-0",
            sessions=Closed(),
            engine=engine,
            chat=CHAT,
            sampling=Sampling(max_tokens=1, stop_token_ids=(STOP,)),
            limits=EpisodeLimits(max_turns=1, context_length=8, timeout_s=FOREVER),
        )

    with pytest.raises(EnvironmentFailure, match="no subprocess"):
        run(episode)
    assert engine.calls == []


def test_messages_of_the_task_begin_the_context():
    task = Task(
        task_id="t/1", environment="e", seed=0, messages=({"role": "system", "content": "guess"},)
    )
    session = FakeSession("a number", outcome(terminated=True))
    engine = FakeEngine(lambda call: [EIGHT, STOP])

    run(lambda: played(session, engine, task=task))

    assert list(engine.calls[0].context) == encode(
        TOKENIZER, "<system> guess <user> a number <assistant>"
    )


def test_logprobs_are_those_of_a_forward_pass_over_the_whole_trajectory():
    model = build_tiny_model(hidden_size=16, num_layers=1, num_heads=2)

    async def episodes():
        host = EnvironmentHost("number_guess", {"max_guesses": 4}, in_process=True)
        async with running(model) as engine:
            return await asyncio.gather(
                *(
                    play(
                        TASK,
                        episode_id=f"g-{i}",
                        sessions=host,
                        engine=engine,
                        chat=CHAT,
                        sampling=Sampling(
                            max_tokens=3, temperature=0.7, stop_token_ids=CHAT.stop_token_ids
                        ),
                        limits=EpisodeLimits(max_turns=16, context_length=64, timeout_s=DEADLINE_S),
                    )
                    for i in range(4)
                )
            )

    trajectories = run(episodes)

    assert len({t.token_ids.tobytes() for t in trajectories}) > 1
    for trajectory in trajectories:
        ids = trajectory.token_ids.tolist()
        table = reference_logprobs(model, ids, temperature=0.7)
        at = np.flatnonzero(trajectory.sampled)
        expected = table[at - 1, trajectory.token_ids[at].astype(np.int64)].numpy()
        assert np.abs(trajectory.behavior_logprobs[at] - expected).max() < TOLERANCE
        assert trajectory.num_turns == 4 or trajectory.reward == 1.0
