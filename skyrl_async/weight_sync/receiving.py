"""The engine's end of a pair, whatever the transport."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skyrl_async.weight_sync.collective import CollectiveReceiver
from skyrl_async.weight_sync.disk import DiskReceiver
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.pair import PairAddress
from skyrl_async.weight_sync.sglang_direct import DirectAddress, DirectReceiver
from skyrl_async.weight_sync.transport import WeightReceiverTransport

Address = PairAddress | DirectAddress | Path
"""Where a receiver finds its sender."""


def receiving_end(
    address: Address,
    *,
    expected: WeightLayout,
    policy_version: int,
    shared: bool = False,
    pinned: bool = False,
) -> WeightReceiverTransport:
    """Return the receiver for a sender's address.

    Args:
        address: of a collective or direct pair, or the folder of a disk transport.
        expected: layout of the engine's parameters.
        policy_version: that the engine runs now; -1 if its weights count for nothing.
        shared: stage into named shared memory, for an engine in another process.
        pinned: stage into page-locked memory, for an engine on a GPU.
    """
    if isinstance(address, DirectAddress):
        return DirectReceiver(address, expected=expected)
    options: dict[str, Any] = {
        "expected": expected,
        "policy_version": policy_version,
        "shared": shared,
        "pinned": pinned,
    }
    if isinstance(address, Path):
        return DiskReceiver(address, **options)
    return CollectiveReceiver(address, **options)
