"""Chat messages to token ids, append-only: what was sampled is never tokenised again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

_REPLY = "REPLYMARK"
_OBSERVATION = "OBSERVATIONMARK"


class Chat:
    """Renders observations with a tokenizer's chat template, and decodes replies.

    ::

        context = chat.prompt(task.messages, first_observation)
        while True:
            reply = await engine.generate(context, ...)
            observation = environment.step(chat.decode(reply.token_ids))
            context += reply.token_ids + chat.observation(observation, stopped=...)

    The text between two replies is taken once from the template, by rendering a marked
    conversation; so it must not depend on the texts around it.

    Args:
        tokenizer: of ``transformers``, with a chat template and a stop token.

    Raises:
        ValueError: if there is no chat template or no stop token, if replies do not end with it, or
            if the template does not keep earlier turns as they were.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; add chat_template.jinja to it")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no stop token; set its eos_token to the end-of-turn token"
            )
        self._tokenizer = tokenizer
        self.stop_token_ids: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        self._stop_text: str = tokenizer.eos_token
        self._before, self._after = self._between_replies()
        self._encode = lru_cache(maxsize=1024)(self._encode_uncached)
        self._decode = lru_cache(maxsize=1024)(self._decode_uncached)
        self._single = lru_cache(maxsize=1024)(self._single_uncached)

    def prompt(self, messages: Sequence[Mapping[str, str]], observation: str) -> list[int]:
        """Return the token ids of the first prompt.

        Args:
            messages: of the task.
            observation: the environment's first, added as a user message unless it is empty.
        """
        if not messages:
            return list(self._single(observation))
        conversation = [dict(m) for m in messages]
        if observation:
            conversation.append({"role": "user", "content": observation})
        return list(self._encode_uncached(self._render(conversation, generate=True)))

    def observation(self, observation: str, *, stopped: bool) -> list[int]:
        """Return the token ids between a reply and the next one.

        Args:
            observation: what the environment answered.
            stopped: whether the reply ended with the stop token; if not, it is added here, where it
                carries no loss.
        """
        stop = "" if stopped else self._stop_text
        return list(self._encode(stop + self._before + observation + self._after))

    def reply(self, text: str) -> list[int]:
        """Return the token ids of a reply that somebody else wrote, its stop token included.

        Raises:
            ValueError: if the policy could not say it: it is empty, contains the stop token, or
                has parts that the tokenizer does not know.
        """
        if not text:
            raise ValueError("the reply is empty")
        ids = list(self._encode_uncached(text))
        if set(ids) & set(self.stop_token_ids):
            raise ValueError(f"the reply {text!r} contains the stop token {self._stop_text!r}")
        if self._tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the reply {text!r} has parts that the tokenizer does not know; it reads "
                f"{self._tokenizer.decode(ids)!r}"
            )
        return [*ids, *self.stop_token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a reply, without its stop token."""
        return self._decode(tuple(token_ids))

    def _single_uncached(self, content: str) -> tuple[int, ...]:
        conversation = [{"role": "user", "content": content}]
        return self._encode_uncached(self._render(conversation, generate=True))

    def _render(self, conversation: Sequence[Mapping[str, str]], *, generate: bool) -> str:
        return self._tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=generate
        )

    def _between_replies(self) -> tuple[str, str]:
        """Return the template's text before and after an observation that follows a reply."""
        conversation = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": _REPLY},
            {"role": "user", "content": _OBSERVATION},
        ]
        text = self._render(conversation, generate=True)
        start = text.find(_REPLY)
        end = text.find(_OBSERVATION)
        if start < 0 or end < start:
            raise ValueError("the chat template does not render replies and observations in order")
        before = text[start + len(_REPLY) : end]
        head, stop, tail = before.partition(self._stop_text)
        if not stop or head.strip():
            raise ValueError(
                f"the chat template ends a reply with {before!r}, which does not begin with the "
                f"stop token {self._stop_text!r}; set the tokenizer's eos_token to the end-of-turn "
                "token"
            )
        return tail, text[end + len(_OBSERVATION) :]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode_uncached(self, token_ids: tuple[int, ...]) -> str:
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids
        return self._tokenizer.decode(ids, skip_special_tokens=False)
