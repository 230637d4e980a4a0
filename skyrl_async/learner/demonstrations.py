"""Demonstrations: conversations to imitate, from a file to sequences with loss on the replies.

A file has one JSON object per line, either of ::

    {"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2 + 2", "completion": "4"}

Other keys of the object are not read. Everything before the first reply is the prompt; between two
replies is one user message, as between two turns of an episode.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from skyrl_async.types import TrainSequence

ROLES = ("system", "user", "assistant")
MAX_SHOWN_PROBLEMS = 10

Message = Mapping[str, str]


class ChatTokens(Protocol):
    """From messages to token ids; see :class:`skyrl_async.rollout.chat.Chat`."""

    def prompt(self, messages: Sequence[Message], observation: str) -> list[int]:
        """Return the token ids of the first prompt."""
        ...

    def observation(self, observation: str, *, stopped: bool) -> list[int]:
        """Return the token ids between a reply and the next one."""
        ...

    def reply(self, text: str) -> list[int]:
        """Return the token ids of a reply, its stop token included."""
        ...


class DemonstrationError(ValueError):
    """A file of demonstrations cannot be used.

    Attributes:
        problems: one line each, all of them.
    """

    def __init__(self, path: str | os.PathLike[str], problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"  {problem}" for problem in self.problems[:MAX_SHOWN_PROBLEMS]]
        rest = len(self.problems) - len(shown)
        if rest:
            shown.append(f"  ... and {rest} more")
        noun = "problem" if len(self.problems) == 1 else "problems"
        super().__init__("\n".join([f"{path}: {len(self.problems)} {noun}:", *shown]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One conversation that ends with a reply.

    Attributes:
        line: in its file, from 1.
        messages: with ``role`` and ``content``; checked.
    """

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations:
    """What is left of a file to train on.

    Attributes:
        sequences: in the order of the file.
        num_dropped: longer than the limit.
    """

    sequences: tuple[TrainSequence, ...]
    num_dropped: int


def read_demonstrations(path: str | os.PathLike[str]) -> list[Demonstration]:
    """Read and check a whole file; blank lines are skipped.

    Raises:
        DemonstrationError: naming every line that is wrong, or that the file cannot be read or has
            no demonstration.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}); give a file of JSON lines"
        raise DemonstrationError(path, [reason]) from error
    found: list[Demonstration] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Demonstration(line=number, messages=_messages(line)))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not found and not problems:
        problems.append("holds no demonstration; give one JSON object per line")
    if problems:
        raise DemonstrationError(path, problems)
    return found


def encode_demonstrations(
    demonstrations: Iterable[Demonstration],
    chat: ChatTokens,
    *,
    path: str | os.PathLike[str],
    max_tokens: int,
    vocabulary_size: int,
    overlong: Literal["refuse", "drop"] = "refuse",
) -> Demonstrations:
    """Return sequences as if the policy had said the replies, tokens as in an episode.

    Each reply carries loss with its stop token, at temperature 1 and with advantage 1.

    Args:
        demonstrations: of one file.
        chat: of the policy.
        path: of the file, for messages.
        max_tokens: of a sequence.
        vocabulary_size: token ids that the policy has.
        overlong: whether longer ones are refused or left out.

    Raises:
        DemonstrationError: naming every line that cannot be encoded or is too long, or that nothing
            is left.
    """
    sequences: list[TrainSequence] = []
    problems: list[str] = []
    num_dropped = 0
    for demonstration in demonstrations:
        try:
            ids, mask = _tokens(demonstration.messages, chat)
        except ValueError as error:
            problems.append(f"line {demonstration.line}: {error}")
            continue
        if len(ids) > max_tokens:
            num_dropped += 1
            if overlong == "refuse":
                problems.append(
                    f"line {demonstration.line}: has {len(ids)} tokens, at most {max_tokens} are "
                    "allowed; raise the limit, shorten it, or drop such lines"
                )
        elif max(ids) >= vocabulary_size:
            problems.append(
                f"line {demonstration.line}: has token id {max(ids)}, but the policy has only "
                f"{vocabulary_size}; its tokenizer belongs to another model"
            )
        else:
            sequences.append(_sequence(ids, mask, group_id=len(sequences)))
    if not sequences and not problems:
        problems.append(f"every demonstration has more than {max_tokens} tokens; raise the limit")
    if problems:
        raise DemonstrationError(path, problems)
    return Demonstrations(sequences=tuple(sequences), num_dropped=num_dropped)


def _messages(line: bytes) -> tuple[Message, ...]:
    """Return the checked messages of one line.

    Raises:
        ValueError: saying what is wrong and what would be right.
    """
    try:
        data = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); write one object per line") from None
    if not isinstance(data, dict):
        raise ValueError(f"must be an object, got {_kind(data)}")
    if "messages" in data:
        if "prompt" in data or "completion" in data:
            raise ValueError("has messages and prompt or completion; keep one of them")
        messages = data["messages"]
        if not isinstance(messages, list):
            raise ValueError(f"messages must be a list, got {_kind(messages)}")
    elif "prompt" in data and "completion" in data:
        messages = [
            {"role": "user", "content": data["prompt"]},
            {"role": "assistant", "content": data["completion"]},
        ]
    else:
        raise ValueError(
            f"has the keys {', '.join(map(str, data)) or '(none)'}; needs messages, or prompt and "
            "completion"
        )
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    _check_order([message["role"] for message in messages])
    return tuple(messages)


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object, got {_kind(message)}")
    if set(message) != {"role", "content"}:
        keys = ", ".join(map(str, message)) or "(none)"
        raise ValueError(
            f"message {number} has the keys {keys}; needs role and content and nothing else"
        )
    if message["role"] not in ROLES:
        raise ValueError(f"message {number} has role {message['role']!r}; one of {ROLES}")
    if not isinstance(message["content"], str):
        raise ValueError(
            f"content of message {number} must be text, got {_kind(message['content'])}"
        )
    if any("\ud800" <= character <= "\udfff" for character in message["content"]):
        raise ValueError(f"content of message {number} has half a surrogate pair; remove it")


def _check_order(roles: Sequence[str]) -> None:
    """Check that the conversation is a prompt, then replies with one user message in between."""
    if "assistant" not in roles:
        raise ValueError("has no assistant message, so nothing to learn; add the reply")
    if roles[-1] != "assistant":
        raise ValueError(f"ends with a {roles[-1]} message; the last one must be the reply")
    first = roles.index("assistant")
    if first == 0:
        raise ValueError("begins with an assistant message; a prompt must come first")
    for index in range(first + 1, len(roles)):
        expected = "assistant" if (index - first) % 2 == 0 else "user"
        if roles[index] != expected:
            raise ValueError(
                f"message {index + 1} has role {roles[index]!r} where {expected!r} is needed: "
                "between two replies is one user message; join or split messages"
            )


def _tokens(messages: Sequence[Message], chat: ChatTokens) -> tuple[list[int], list[bool]]:
    """Return token ids, and which of them carry loss.

    Raises:
        ValueError: if a reply cannot be encoded or the chat template refuses the prompt.
    """
    from jinja2 import TemplateError

    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    try:
        ids = chat.prompt(messages[:first], "")
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the prompt ({error})") from error
    mask = [False] * len(ids)
    for part, carries_loss in _after_prompt(messages[first:], chat):
        ids += part
        mask += [carries_loss] * len(part)
    return ids, mask


def _after_prompt(
    messages: Sequence[Message], chat: ChatTokens
) -> Iterator[tuple[list[int], bool]]:
    for message in messages:
        if message["role"] == "assistant":
            yield chat.reply(message["content"]), True
        else:
            yield chat.observation(message["content"], stopped=True), False


def _sequence(ids: Sequence[int], mask: Sequence[bool], *, group_id: int) -> TrainSequence:
    loss_mask = np.array(mask, np.bool_)
    return TrainSequence(
        token_ids=np.array(ids, np.int32),
        loss_mask=loss_mask,
        behavior_logprobs=np.zeros(len(ids), np.float32),
        policy_versions=np.where(loss_mask, 0, -1).astype(np.int32),
        temperature=1.0,
        advantages=loss_mask.astype(np.float32),
        reward=0.0,
        group_id=group_id,
    )


def _kind(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
