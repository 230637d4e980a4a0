"""The weight receiver beside an engine of a rollout actor's own process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_async.rollout.actor import Engine
    from skyrl_async.weight_sync.layout import WeightLayout
    from skyrl_async.weight_sync.receiving import Address

Weights = Mapping[str, Any]


class EngineReceiver:
    """Receives versions in a thread and swaps them in on the engine's event loop.

    Args:
        engine: that loads them.
        timeout_s: of a swap.
    """

    def __init__(self, engine: Engine, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._receiver: Any = None

    def connect(
        self,
        address: Address,
        *,
        expected: WeightLayout,
        prepare: Callable[[Weights], Weights],
        on_swap: Callable[[], None],
        pinned: bool = False,
    ) -> None:
        """Start to receive; called on the engine's event loop.

        Args:
            address: of this engine's sender.
            expected: layout of what is received.
            prepare: makes the engine's weights of it, in the receiver's thread.
            on_swap: called after every swap.
            pinned: receive into page-locked memory.
        """
        from skyrl_async.weight_sync.receiver import WeightReceiver
        from skyrl_async.weight_sync.receiving import receiving_end

        loop = asyncio.get_running_loop()

        async def swap(weights: Weights, policy_version: int) -> None:
            await self._engine.load_weights(weights, policy_version=policy_version)
            on_swap()

        def load(weights: Weights, policy_version: int) -> None:
            swapping = asyncio.run_coroutine_threadsafe(
                swap(prepare(weights), policy_version), loop
            )
            swapping.result(self._timeout_s)

        transport = receiving_end(address, expected=expected, policy_version=0, pinned=pinned)
        self._receiver = WeightReceiver(transport, load)

    def check(self) -> None:
        """Do nothing while the receiver works.

        Raises:
            RuntimeError: from what ended it.
        """
        if self._receiver is not None:
            self._receiver.check()

    async def close(self) -> None:
        """Stop receiving."""
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.close)
