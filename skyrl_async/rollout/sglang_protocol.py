"""Requests to one SGLang server, and its replies, as plain values; nothing here does I/O.

One request, one stream::

    body = make_body(context, sampling, rid=new_rid(), vocab_size=320, extra_key="4")
    reply = StreamedReply(known_version=4)
    for payload in splitter.feed(received_bytes):
        reply.feed(payload)
    return reply.whole or reply.certain()         # of a stream that broke, what can be kept

**What can be kept of a broken stream.** Only the last chunk says which version sampled each token
(``weight_versions``); every chunk before it carries one number, the version that the server's HTTP
process knew when it passed the chunk on. That number changes after the weights have, and tokens of
the old weights may still be on their way to it: a token may be older than the number beside it, but
not newer, because generation is paused while weights are loaded. And no token is older than the
version that the server had already reported before the request was sent. So a token is certain
while all numbers so far equal that version; the first other number ends what is kept, since a token
after a discarded one has lost its context.

**With adapters** a request names one and keeps it, so that its version is that of every token. The
server's own label is then that of the weights beneath, which must not change meanwhile.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl_async.rollout.engine_errors import (
    AbortedByServer,
    BadReply,
    EngineError,
    InvalidRequest,
    NonfiniteLogprob,
    UnverifiedWeights,
    error_of_status,
)
from skyrl_async.types import FinishReason, Int32Array, Sampling

_MAX_VERSION = 2**31 - 1


def adapter_name(policy_version: int) -> str:
    """Return what requests call the adapter of a version."""
    return f"v{policy_version}"


def adapter_version(name: object) -> int | None:
    """Return the policy version of an adapter of ours; None for any other name."""
    if not isinstance(name, str) or not name.isascii():
        return None
    digits = name.removeprefix("v")
    return int(digits) if digits.isdecimal() and adapter_name(int(digits)) == name else None


def new_rid() -> str:
    """Return a request id; all have one length, because the server aborts by prefix."""
    return uuid.uuid4().hex


def make_body(
    token_ids: Sequence[int] | Int32Array,
    sampling: Sampling,
    *,
    rid: str,
    vocab_size: int,
    extra_key: str | None = None,
    adapter: str | None = None,
    stream_interval: int = 32,
) -> dict[str, Any]:
    """Return the body of ``POST /generate``.

    The server adds the end-of-text tokens of its model to ``stop_token_ids``; without any of ours
    nothing ends the reply but its length. At temperature 0 it samples greedily and reports the
    logprobs of temperature 1.

    Args:
        token_ids: ``[P]``, the whole context.
        sampling: how to sample.
        rid: of :func:`new_rid`.
        vocab_size: token ids are below it; one that is not would end the server.
        extra_key: requests share cached prefixes only with those of the same key.
        adapter: to sample with; requests share cached prefixes only with those of the same one.
        stream_interval: tokens between two chunks.

    Raises:
        InvalidRequest: if the context is empty or outside the vocabulary.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not len(ids):
        raise InvalidRequest(f"the context must be a list of token ids, got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise InvalidRequest(f"token ids must be integers, got {ids.dtype}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InvalidRequest(
            f"token ids must be in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}; "
            "is the tokenizer that of the engine's model?"
        )
    stop_ids = list(sampling.stop_token_ids)
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": ids.tolist(),
        "sampling_params": {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": stop_ids,
            "ignore_eos": not stop_ids,
            "stream_interval": stream_interval,
        },
        "return_logprob": True,
        "stream": True,
    }
    if extra_key is not None:
        body["extra_key"] = extra_key
    if adapter is not None:
        body["lora_path"] = adapter
    return body


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reply:
    """Tokens of one request to one server, with lists of one length.

    Attributes:
        token_ids: as sampled, the stop token included.
        logprobs: of them, at the temperature that sampled them (at 1 if greedy).
        policy_versions: of the weights that sampled them; they never decrease.
        finish_reason: ABORT if the reply is not whole.
        prompt_tokens: of the context; 0 if the server has not said it yet.
        cached_tokens: of them found in the prefix cache.
    """

    token_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int


class EventSplitter:
    """Cuts the bytes of a stream of server-sent events into the payloads of its events."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that ``data`` completes, the final ``[DONE]`` left out."""
        buffer = self._buffer
        start = max(0, len(buffer) - 1)
        buffer += data
        end = buffer.rfind(b"\n\n", start)
        if end < 0:
            return []
        whole = bytes(buffer[:end])
        del buffer[: end + 2]
        events = (event.strip() for event in whole.split(b"\n\n"))
        payloads = (e.removeprefix(b"data:").strip() for e in events if e.startswith(b"data:"))
        return [payload for payload in payloads if payload != b"[DONE]"]


class StreamedReply:
    """Collects the chunks of one stream, whether each repeats the earlier ones or not.

    Args:
        known_version: the newest that the server had reported before the request was sent; with
            ``by_adapter``, that of the adapter that the request names.
        by_adapter: whether it names one.
    """

    def __init__(self, *, known_version: int, by_adapter: bool = False) -> None:
        self._known_version = known_version
        self._by_adapter = by_adapter
        self._label: object = None
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._certain = 0
        self._all_certain = True
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._whole: Reply | None = None
        self.reported_version = known_version

    def feed(self, payload: bytes) -> None:
        """Take one chunk.

        Raises:
            EngineError: if the chunk reports an error, or tokens that must not be used; ``partial``
                then holds what can be.
        """
        try:
            self._feed(payload)
        except EngineError as error:
            if error.partial is None:
                error.partial = self.certain()
            raise

    @property
    def whole(self) -> Reply | None:
        """The whole reply, once its last chunk was taken."""
        return self._whole

    def certain(self) -> Reply:
        """Return what is certain of a stream that broke; see the module's rule."""
        versions = [self._known_version] * self._certain
        return self._reply(versions, FinishReason.ABORT)

    def _feed(self, payload: bytes) -> None:
        chunk = _decode(payload)
        if "error" in chunk:
            error = chunk["error"]
            message = str(error.get("message") if isinstance(error, Mapping) else error)
            code = error.get("code") if isinstance(error, Mapping) else None
            raise error_of_status(code if isinstance(code, int) else 400, message)
        meta = chunk.get("meta_info")
        if not isinstance(meta, Mapping):
            raise BadReply(f"a chunk without meta_info: {payload[:200]!r}")
        self._take_tokens(chunk, meta)
        self._prompt_tokens = int(meta.get("prompt_tokens") or self._prompt_tokens)
        self._cached_tokens = int(meta.get("cached_tokens") or self._cached_tokens)
        reason = meta.get("finish_reason")
        if reason is None:
            self._take_version(meta.get("weight_version"))
        else:
            self._finish(meta, reason)

    def _take_tokens(self, chunk: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Append the tokens that were not received before."""
        received = len(self._token_ids)
        entries = meta.get("output_token_logprobs") or []
        # An aborted request that had not started has no counts.
        total = int(meta.get("completion_tokens") or 0)
        start = max(0, total - len(entries))
        if start > received or total < received:
            raise BadReply(
                f"a chunk holds tokens {start}..{total} with logprobs, but {received} were "
                "received before; the request asked for a logprob of every token"
            )
        new = entries[received - start : total - start]
        ids = [entry[1] for entry in new]
        output_ids = chunk.get("output_ids") or []
        if len(output_ids) in (total, len(ids)) and output_ids[len(output_ids) - len(ids) :] != ids:
            raise BadReply("output_ids and output_token_logprobs name different tokens")
        logprobs = [entry[0] for entry in new]
        if not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
            raise NonfiniteLogprob(
                f"the logprob of a sampled token among tokens {received}..{total} is not a finite "
                "number; the weights or the engine's kernels produce NaN"
            )
        self._token_ids += ids
        self._logprobs += logprobs

    def _take_version(self, text: object) -> None:
        if self._by_adapter:
            self._check_label(text)
            self._certain = len(self._token_ids)
            return
        version = parse_version(text)
        self.reported_version = max(self.reported_version, version)
        self._all_certain = self._all_certain and version == self._known_version
        if self._all_certain:
            self._certain = len(self._token_ids)

    def _finish(self, meta: Mapping[str, Any], reason: Any) -> None:
        kind = reason.get("type") if isinstance(reason, Mapping) else reason
        versions = self._versions(meta.get("weight_versions"))
        if versions:
            self.reported_version = max(self.reported_version, versions[-1])
        if kind == "abort":
            partial = self._reply(versions, FinishReason.ABORT)
            status = reason.get("status_code") if isinstance(reason, Mapping) else None
            message = str(reason.get("message", "")) if isinstance(reason, Mapping) else ""
            error = (
                error_of_status(int(status), message)
                if status is not None
                else AbortedByServer(f"the server aborted the request: {message}")
            )
            error.partial = partial
            raise error
        if kind == "length":
            self._whole = self._reply(versions, FinishReason.LENGTH)
        elif kind == "stop" and not isinstance(reason.get("matched"), str):
            self._whole = self._reply(versions, FinishReason.STOP)
        elif kind == "stop":
            raise NonfiniteLogprob(f"the server stopped with {reason['matched']!r}")
        else:
            raise BadReply(f"unknown finish_reason {reason!r}")

    def _versions(self, spans: object) -> list[int]:
        if not self._by_adapter:
            return versions_of_spans(spans, len(self._token_ids))
        for span in spans if isinstance(spans, Sequence) else ():
            self._check_label(span["version"])
        return [self._known_version] * len(self._token_ids)

    def _check_label(self, text: object) -> None:
        """Raise UnverifiedWeights if the weights beneath the adapter have changed."""
        if self._label not in (None, text):
            raise UnverifiedWeights(
                f"the weights beneath the adapter were {self._label!r} and became {text!r} within "
                "one reply; load nothing but adapters into this server"
            )
        self._label = text

    def _reply(self, versions: list[int], reason: FinishReason) -> Reply:
        return Reply(
            token_ids=self._token_ids[: len(versions)],
            logprobs=self._logprobs[: len(versions)],
            policy_versions=versions,
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )


def _decode(payload: bytes) -> Mapping[str, Any]:
    try:
        chunk = json.loads(payload)
    except ValueError:
        raise BadReply(f"a chunk that is not JSON: {payload[:200]!r}") from None
    if not isinstance(chunk, Mapping):
        raise BadReply(f"a chunk that is not an object: {payload[:200]!r}")
    return chunk


def parse_version(text: object) -> int:
    """Return the policy version that ``text``, a label of SGLang, stands for.

    Raises:
        UnverifiedWeights: if it is not a decimal number.
    """
    if isinstance(text, str) and text.isascii() and text.isdecimal() and int(text) <= _MAX_VERSION:
        return int(text)
    raise UnverifiedWeights(
        f"the server's weights are labelled {text!r}, not with a policy version: nobody has "
        "verified what they are"
    )


def versions_of_spans(spans: object, num_tokens: int) -> list[int]:
    """Return the policy version of each of ``num_tokens`` tokens.

    Args:
        spans: ``meta_info.weight_versions``: ``[{"version": "4", "start": 0, "end": 188}, …]``.
        num_tokens: that they must cover, in order and without gaps.

    Raises:
        BadReply: if they do not, or if versions decrease.
        UnverifiedWeights: if a token was sampled by weights that are not a policy version.
    """
    if not isinstance(spans, Sequence):
        raise BadReply(
            f"the reply has no weight_versions but {spans!r}: the server does not say which "
            "weights sampled its tokens"
        )
    versions: list[int] = []
    for span in spans:
        start, end = int(span["start"]), int(span["end"])
        if start != len(versions) or end < start:
            raise BadReply(f"weight_versions {spans!r} have a gap or overlap at token {start}")
        if start == end:
            continue
        version = parse_version(span["version"])
        if versions and version < versions[-1]:
            raise BadReply(f"weight_versions decrease: {spans!r}")
        versions += [version] * (end - start)
    if len(versions) != num_tokens:
        raise BadReply(f"weight_versions {spans!r} do not cover {num_tokens} tokens")
    return versions
