"""The thread beside an engine that receives, verifies and loads new weights while it decodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from skyrl_async.weight_sync.transport import LearnerLost, StagedWeights, WeightReceiverTransport

_WAKE_UP_S = 1.0


class WeightReceiver:
    """Runs ``receive, load, acknowledge`` until the learner leaves or :meth:`close` is called.

    ``load(weights, policy_version)`` blocks until the engine runs the weights, and raises if it
    kept its old ones. For an engine on an asyncio loop in another thread::

        def load(weights: Mapping[str, Tensor], policy_version: int) -> None:
            loading = engine.load_weights(weights, policy_version=policy_version)
            asyncio.run_coroutine_threadsafe(loading, loop).result(timeout=30)

    The engine may exchange pointers: the tensors stay valid until it has loaded a later version,
    two buffers take turns. A ``TimeoutError`` leaves open which version runs, so nothing may be
    written any more: it ends the receiver.

    Args:
        transport: the engine's end of a pair; the receiver closes it.
        load: as above.
        on_end: called once in the receiver's thread with the exception that ended it, not after
            :meth:`close`.
        cpus: that the receiver's thread, and those of its groups, may use; None leaves them.
        name: of the thread.
    """

    def __init__(
        self,
        transport: WeightReceiverTransport,
        load: Callable[[Mapping[str, Tensor], int], None],
        *,
        on_end: Callable[[BaseException], None] | None = None,
        cpus: Collection[int] | None = None,
        name: str = "weight-receiver",
    ) -> None:
        self._transport = transport
        self._load = load
        self._on_end = on_end
        self._cpus = cpus
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Do nothing while the receiver works, or after :meth:`close`.

        Raises:
            RuntimeError: from the exception that ended it; the engine stays on its version.
        """
        if self._error is not None:
            raise RuntimeError(f"the weight receiver ended: {self._error}") from self._error

    def close(self, timeout_s: float = 1.0) -> None:
        """End the pair and the thread, also in the middle of a transfer; idempotent."""
        self._closed = True
        self._transport.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)
            while not self._closed:
                staged = self._transport.receive(_WAKE_UP_S)
                if staged is not None:
                    self._transport.acknowledge(staged, self._try_load(staged))
        except BaseException as error:
            self._transport.close()
            if not (self._closed and isinstance(error, LearnerLost)):
                self._error = error
                if self._on_end is not None:
                    self._on_end(error)

    def _try_load(self, staged: StagedWeights) -> str | None:
        """Load and return None, or why the engine kept its old version."""
        try:
            self._load(staged.weights, staged.policy_version)
        except TimeoutError:
            raise
        except Exception as error:
            return f"loading policy version {staged.policy_version}: {error!r}"
        return None
