import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.learner.demonstrations import (
    MAX_SHOWN_PROBLEMS,
    Demonstration,
    DemonstrationError,
    encode_demonstrations,
    read_demonstrations,
)
from skyrl_async.learner.tiny_policy import VOCABULARY, build_tiny_tokenizer
from skyrl_async.rollout.chat import Chat
from skyrl_async.rollout.episode import EpisodeLimits, play
from skyrl_async.types import Sampling, Task
from tests.rollout_fakes import FakeEngine, FakeSession, FakeSessions, outcome

TOKENIZER = build_tiny_tokenizer()
CHAT = Chat(TOKENIZER)
STOP = TOKENIZER.eos_token_id


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encoded(*messages, max_tokens: int = 100, **options):
    demonstration = Demonstration(line=1, messages=messages)
    options = {"path": "d.jsonl", "max_tokens": max_tokens, "vocabulary_size": 64} | options
    return encode_demonstrations([demonstration], CHAT, **options)


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(DemonstrationError) as refused:
        read_demonstrations(path)
    return refused.value.problems


def test_both_forms_of_a_line_and_its_number(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"messages": [user("a"), assistant("1")], "source": "somewhere"},
        "",
        {"prompt": "is the number", "completion": "2"},
    )
    assert read_demonstrations(path) == [
        Demonstration(line=1, messages=(user("a"), assistant("1"))),
        Demonstration(line=3, messages=(user("is the number"), assistant("2"))),
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be an object, got a list"),
        ({"text": "a"}, "has the keys text; needs messages"),
        ({"prompt": "a"}, "needs messages, or prompt and completion"),
        ({"messages": [], "prompt": "a"}, "keep one of them"),
        ({"messages": "a"}, "messages must be a list, got text"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [user("a")]}, "no assistant message"),
        ({"messages": ["a"]}, "message 1 must be an object"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "message 2 has the keys role;"),
        ({"messages": [user("a"), assistant("1") | {"name": "b"}]}, "nothing else"),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "message 2 has role 'tool'"),
        ({"messages": [user("a"), {"role": ["b"], "content": "b"}]}, "message 2 has role ['b']"),
        ({"messages": [user("a"), assistant(None)]}, "must be text, got null"),
        ({"prompt": "a", "completion": 3}, "content of message 2 must be text, got a number"),
        ({"prompt": "a\ud800", "completion": "1"}, "content of message 1 has half a surrogate"),
        ({"messages": [assistant("1")]}, "a prompt must come first"),
        ({"messages": [user("a"), assistant("1"), user("b")]}, "ends with a user message"),
        (
            {"messages": [user("a"), assistant("1"), user("a"), user("a"), assistant("2")]},
            "message 4 has role 'user' where 'assistant' is needed",
        ),
        (
            {"messages": [user("a"), assistant("1"), assistant("2")]},
            "message 3 has role 'assistant' where 'user' is needed",
        ),
    ],
)
def test_a_line_that_is_wrong_is_named_with_what_is_wrong(tmp_path, row, says):
    good = {"prompt": "a", "completion": "1"}
    (problem,) = problems_of(write(tmp_path / "d.jsonl", good, row, good))
    assert problem.startswith("line 2: ") and says in problem


def test_all_wrong_lines_are_found_and_the_first_ones_shown(tmp_path):
    path = write(tmp_path / "d.jsonl", *["{"] * (MAX_SHOWN_PROBLEMS + 3))
    with pytest.raises(DemonstrationError) as refused:
        read_demonstrations(path)
    assert len(refused.value.problems) == MAX_SHOWN_PROBLEMS + 3
    text = str(refused.value)
    assert str(path) in text and "line 10:" in text and "line 11:" not in text
    assert "... and 3 more" in text


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read" in problems_of(tmp_path / "missing.jsonl")[0]
    assert "cannot be read" in problems_of(tmp_path)[0]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no demonstration" in problems_of(tmp_path / "empty.jsonl")[0]
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4", "completion": "1"}')
    assert "not UTF-8" in problems_of(tmp_path / "latin.jsonl")[0]


def test_the_worked_example():
    (sequence,) = encoded(
        user("guess 1 to 10"), assistant("5"), user("higher"), assistant("8")
    ).sequences
    words = " ".join(VOCABULARY[i] for i in sequence.token_ids)
    assert words == "<user> guess 1 to 10 <assistant> 5 <end> <user> higher <assistant> 8 <end>"
    loss = [VOCABULARY[i] for i in sequence.token_ids[sequence.loss_mask]]
    assert loss == ["5", "<end>", "8", "<end>"]
    assert sequence.advantages.tolist() == sequence.loss_mask.astype(float).tolist()
    assert not sequence.behavior_logprobs.any()
    assert sequence.policy_versions.tolist() == [0 if m else -1 for m in sequence.loss_mask]
    assert sequence.temperature == 1.0


WORDS = [word for word in VOCABULARY if not word.startswith("<")]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    system=st.none() | TEXT,
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
)
def test_tokens_are_those_of_the_rendered_conversation_and_loss_is_on_replies(system, turns):
    conversation = [] if system is None else [{"role": "system", "content": system}]
    for observation, reply in turns:
        conversation += [user(observation), assistant(reply)]
    (sequence,) = encoded(*conversation).sequences
    rendered = TOKENIZER.apply_chat_template(conversation, tokenize=False)
    assert sequence.token_ids.tolist() == TOKENIZER(rendered)["input_ids"]
    expected, in_reply = [], False
    for token in sequence.token_ids.tolist():
        expected.append(in_reply)
        in_reply = (in_reply or VOCABULARY[token] == "<assistant>") and token != STOP
    assert sequence.loss_mask.tolist() == expected


def test_an_episode_with_the_same_replies_has_the_same_tokens_and_loss():
    replies = ["5", "8", "9"]
    sessions = FakeSessions(
        lambda _: FakeSession(
            "guess 1 to 10",
            outcome("higher"),
            outcome("lower"),
            outcome("correct", reward=1.0, terminated=True),
        )
    )
    given = iter(replies)
    trajectory = asyncio.run(
        play(
            Task(task_id="t", environment="e", seed=0),
            episode_id="0",
            sessions=sessions,
            engine=FakeEngine(lambda _: [*TOKENIZER(next(given))["input_ids"], STOP]),
            chat=CHAT,
            sampling=Sampling(max_tokens=4, stop_token_ids=CHAT.stop_token_ids),
            limits=EpisodeLimits(max_turns=5, context_length=64, timeout_s=10),
        )
    )
    (sequence,) = encoded(
        *(user("guess 1 to 10"), assistant("5"), user("higher"), assistant("8")),
        *(user("lower"), assistant("9")),
    ).sequences
    assert np.array_equal(sequence.token_ids, trajectory.token_ids)
    assert np.array_equal(sequence.loss_mask, trajectory.sampled)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("", "the reply is empty"),
        ("5 <end> 6", "contains the stop token '<end>'"),
        ("guess 25", "parts that the tokenizer does not know; it reads 'guess <unk>'"),
    ],
)
def test_replies_that_the_policy_could_not_say_are_refused(reply, says):
    with pytest.raises(DemonstrationError, match="line 1: ") as refused:
        encoded(user("a"), assistant(reply))
    assert says in str(refused.value)


def test_too_long_ones_are_refused_or_dropped_and_counted():
    short, long = (user("a"), assistant("1")), (user("a"), assistant("1 2 3 4 5"))
    demonstrations = [
        Demonstration(line=n, messages=m) for n, m in enumerate([short, long, short], start=1)
    ]
    options = {"path": "d.jsonl", "max_tokens": 5, "vocabulary_size": 64}
    with pytest.raises(DemonstrationError) as refused:
        encode_demonstrations(demonstrations, CHAT, **options)
    assert refused.value.problems[0].startswith("line 2: has 9 tokens, at most 5")
    result = encode_demonstrations(demonstrations, CHAT, overlong="drop", **options)
    assert (len(result.sequences), result.num_dropped) == (2, 1)
    assert [s.group_id for s in result.sequences] == [0, 1]
    with pytest.raises(DemonstrationError, match="every demonstration has more than 4 tokens"):
        encode_demonstrations(
            demonstrations, CHAT, overlong="drop", **(options | {"max_tokens": 4})
        )


def test_a_tokenizer_of_another_model_is_refused():
    largest = VOCABULARY.index("lower")
    assert encoded(user("a"), assistant("lower"), vocabulary_size=largest + 1).sequences
    with pytest.raises(DemonstrationError, match=f"token id {largest}"):
        encoded(user("a"), assistant("lower"), vocabulary_size=largest)


def test_a_prompt_that_the_template_refuses_is_named():
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    demonstration = Demonstration(
        line=7, messages=({"role": "system", "content": "a"}, user("b"), assistant("1"))
    )
    with pytest.raises(DemonstrationError, match=r"line 7: .*no system role"):
        encode_demonstrations(
            [demonstration], Chat(tokenizer), path="d", max_tokens=100, vocabulary_size=64
        )
