"""One generation on its way through one or several engines, and its tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyrl_async.rollout.engine_errors import InvalidRequest, UnverifiedWeights
from skyrl_async.rollout.engine_routing import Member, Ticket
from skyrl_async.rollout.sglang_protocol import Reply
from skyrl_async.types import FinishReason, Generation, Int32Array, Sampling


def fit_context(
    token_ids: Sequence[int] | Int32Array, sampling: Sampling, context_length: int
) -> tuple[NDArray[Any], Sampling]:
    """Return the context as an array, and no more tokens to sample than there is room for.

    Raises:
        InvalidRequest: if there is room for none.
    """
    context = np.asarray(token_ids)
    room = context_length - len(context)
    if room < 1:
        raise InvalidRequest(
            f"the context has {len(context)} tokens, of {context_length} with the reply; raise "
            "engine.context_length"
        )
    return context, replace(sampling, max_tokens=min(sampling.max_tokens, room))


class CacheNamespaces:
    """Names the prefix cache that a request may share.

    If an engine recomputes KV at a swap, all requests of one version share. If it keeps KV, what is
    cached mixes versions, so only the turns of one group share (a session is ``<group>-<member>``),
    under the version of the session's first request.

    Args:
        by_version: whether KV is recomputed.
    """

    def __init__(self, *, by_version: bool) -> None:
        self._by_version = by_version
        self._of_session: dict[str, str] = {}

    def name(self, session_id: str | None, request_name: str, *, version: int) -> str:
        """Return the namespace of a request to an engine that reported ``version``."""
        if self._by_version:
            return str(version)
        if session_id is None:
            return f"{request_name}@{version}"
        group = session_id.rpartition("-")[0] or session_id
        return self._of_session.setdefault(session_id, f"{group}@{version}")

    def forget(self, session_id: str) -> None:
        """Forget a session."""
        self._of_session.pop(session_id, None)


class PoolRequest:
    """Collects the parts that engines give, until they are a generation.

    Args:
        context: ``[P]``.
        sampling: of the whole generation.
        session_id: of the conversation, if any.
        name: the caller's request id.
    """

    def __init__(
        self, context: NDArray[Any], sampling: Sampling, *, session_id: str | None, name: str
    ) -> None:
        self.context = context
        self.sampling = sampling
        self.session_id = session_id
        self.name = name
        self.failures = 0
        self.queued_s = 0.0
        self.aborted = False
        self.ticket: Ticket | None = None
        self.member: Member | None = None
        self.rid = ""
        self.discard()

    def discard(self) -> None:
        """Start the turn again."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.policy_versions: list[int] = []

    @property
    def min_version(self) -> int:
        """Engines behind it would make versions decrease."""
        return self.policy_versions[-1] if self.policy_versions else 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why nothing is missing, also if no engine lived to say so; None if something is."""
        if self.token_ids and self.token_ids[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.ABORT if self.aborted else None

    def append(self, reply: Reply) -> None:
        """Add the tokens of one engine.

        Raises:
            UnverifiedWeights: if it used older weights than it had reported; everything is
                discarded, because later tokens follow from earlier ones.
        """
        if reply.policy_versions and reply.policy_versions[0] < self.min_version:
            newest = self.min_version
            self.discard()
            raise UnverifiedWeights(
                f"the engine reported policy version {newest} or newer, and then sampled with "
                f"{reply.policy_versions[0]}"
            )
        self.token_ids += reply.token_ids
        self.logprobs += reply.logprobs
        self.policy_versions += reply.policy_versions

    def remaining(self) -> tuple[NDArray[Any], Sampling]:
        """Return context and sampling of what is missing."""
        if not self.token_ids:
            return self.context, self.sampling
        context = np.concatenate([self.context, np.array(self.token_ids, np.int32)])
        left = self.sampling.max_tokens - len(self.token_ids)
        return context, replace(self.sampling, max_tokens=left)

    def generation(self, reason: FinishReason) -> Generation:
        """Return everything as one record."""
        return Generation(
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            policy_versions=np.array(self.policy_versions, np.int32),
            temperature=self.sampling.temperature or 1.0,
            finish_reason=reason,
            queued_s=self.queued_s,
        )
