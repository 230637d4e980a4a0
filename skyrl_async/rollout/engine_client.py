"""What every engine offers to the code that plays episodes and to the code that publishes weights.

Token ids go in, token ids with their logprobs and policy versions come out. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skyrl_async.types import Generation, Int32Array, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class EngineClient(Protocol):
    """Generation, flow control and weight loading of one engine."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that compute the next token."""
        ...

    async def generate(
        self,
        token_ids: Sequence[int] | Int32Array,
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str | None = None,
    ) -> Generation:
        """Continue ``token_ids`` until a stop token or a limit.

        Args:
            token_ids: ``[P]``, the whole context: prompt, earlier replies and observations.
            sampling: how to sample.
            request_id: unique among the requests that have not returned yet.
            session_id: names a conversation whose turns extend each other, so that the engine may
                keep its KV cache between them. At most one live request per session.

        Returns:
            The sampled tokens, the stop token included.

        Raises:
            ValueError: if the context is empty, too long, outside the vocabulary, or an id is
                already in use.
            RuntimeError: if the logits were not finite, or the engine stopped.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its waiter gets the tokens sampled so far. Unknown ids are ignored."""
        ...

    def release(self, session_id: str) -> None:
        """Say that no further turn of a session will come. Unknown ids are ignored."""
        ...

    async def pause(self) -> None:
        """Stop computing after the current decode step and keep all requests."""
        ...

    async def resume(self) -> None:
        """Go on after :meth:`pause`."""
        ...

    async def load_weights(self, weights: Mapping[str, Tensor], *, policy_version: int) -> None:
        """Replace all parameters between two decode steps; return when that has happened.

        Args:
            weights: every parameter by its Hugging Face name, with unchanged shapes and dtypes.
            policy_version: must be above the present one.

        Raises:
            ValueError: if a name is missing or unknown, a shape, dtype or device differs, or the
                version does not increase; then nothing was changed.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine did since the previous snapshot.

    Attributes:
        decode_steps: forward passes.
        finished_requests: requests that returned a generation, aborted ones included.
        generated_tokens: sampled tokens.
        prefilled_tokens: context tokens computed for the first time, or again after their KV was
            evicted; copies between identical prompts are free and not counted.
        reprefilled_tokens: tokens of running requests computed again because of a weight swap.
        num_swaps: weight swaps.
        swap_stall_s: seconds of exchanging parameters, and of the forward passes that recomputed
            running requests.
        longest_gap_s: longest time between two decode steps while requests were running.
        longest_gap_decode_steps: the same over the mean time between two decode steps.
        busy_s: seconds in decode steps and swaps.
        yielded_s: seconds left to other coroutines of the event loop while there was work.
        idle_s: seconds without requests, or paused.
        running: requests being decoded now.
        waiting: requests not admitted yet.
    """

    decode_steps: int = 0
    finished_requests: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    reprefilled_tokens: int = 0
    num_swaps: int = 0
    swap_stall_s: float = 0.0
    longest_gap_s: float = 0.0
    longest_gap_decode_steps: float = 0.0
    busy_s: float = 0.0
    yielded_s: float = 0.0
    idle_s: float = 0.0
    running: int = 0
    waiting: int = 0
