"""What the two ends of a weight transfer promise, and the checks that both transports share.

The sender and the receiver of one engine form a pair, and the loop is always the same::

    learner                                     beside the engine
    sender.send(snapshot, deadline=...)         staged = transport.receive(timeout_s)
      manifest  ----------------------------->    refuse, or accept
      bytes     ----------------------------->    staged in a free buffer, then verified
                                                load(staged.weights, staged.policy_version)
      returns   <-----------------------------  transport.acknowledge(staged, error)

A version that is refused, damaged or not loaded leaves the engine on its old version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.snapshot import WeightSnapshot

MAX_POLICY_VERSION = 2**31 - 1
"""Generations carry versions as int32."""


class TransferRejected(RuntimeError):
    """The engine kept its old version and is ready for another attempt.

    Attributes:
        retryable: whether sending the same version again may succeed.
    """

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


class EngineLost(RuntimeError):
    """The engine died, hung or left; its sender is closed and of no further use."""


class LearnerLost(RuntimeError):
    """The learner died or left; the receiver is of no further use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One version that an engine has loaded.

    Attributes:
        size_bytes: moved.
        transfer_s: seconds from the announcement until all bytes were moved.
        load_s: seconds from then until the engine had verified and loaded them.
    """

    size_bytes: int
    transfer_s: float
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedWeights:
    """A verified version beside the engine.

    Attributes:
        policy_version: that loading it makes live.
        weights: views into a staging buffer, which is written again only after a later version
            was loaded.
        deadline: ``time.monotonic()`` at which the sender stops waiting.
    """

    policy_version: int
    weights: Mapping[str, Tensor]
    deadline: float


class WeightSender(Protocol):
    """The learner's end of one pair."""

    def send(self, snapshot: WeightSnapshot, *, deadline: float) -> TransferReport:
        """Send ``snapshot`` and return when the engine runs it.

        Args:
            snapshot: must not be released before this returns.
            deadline: ``time.monotonic()`` at which the engine is given up.

        Raises:
            TransferRejected: the engine kept its old version; the pair stays usable.
            EngineLost: no acknowledgement before the deadline, or the engine is gone; the pair is
                closed.
        """
        ...

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``send`` raises ``EngineLost`` at once."""
        ...


class WeightReceiverTransport(Protocol):
    """The engine's end of one pair; one thread calls everything but ``close``."""

    def receive(self, timeout_s: float) -> StagedWeights | None:
        """Wait for a version, stage and verify it.

        Refused and damaged versions are answered here.

        Returns:
            The verified version, or None if none came, or the one that came was rejected.

        Raises:
            LearnerLost: the learner is gone or has ended the pair.
        """
        ...

    def acknowledge(self, staged: StagedWeights, error: str | None) -> None:
        """Say that the engine runs ``staged``, or why it kept its old version.

        Raises:
            LearnerLost: the learner is gone; the engine keeps what it has loaded.
        """
        ...

    def close(self) -> None:
        """End the pair, from any thread; a blocked ``receive`` raises ``LearnerLost`` at once."""
        ...


_MANIFEST_FIELDS = tuple(field.name for field in fields(WeightManifest))


def encode_manifest(manifest: WeightManifest) -> str:
    """Return ``manifest`` as JSON."""
    values = {name: getattr(manifest, name) for name in _MANIFEST_FIELDS}
    return json.dumps(values, separators=(",", ":"))


def decode_manifest(text: str | bytes) -> WeightManifest:
    """Read what :func:`encode_manifest` wrote.

    Raises:
        ValueError: if it is not JSON, a field is missing, unknown or of the wrong type, or a
            number is out of range.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.keys() != set(_MANIFEST_FIELDS):
        raise ValueError(f"a manifest has exactly the fields {', '.join(_MANIFEST_FIELDS)}")
    shapes = values["shapes"]
    if not isinstance(shapes, list) or not all(isinstance(shape, list) for shape in shapes):
        raise ValueError("shapes of a manifest must be a list of lists")
    return WeightManifest(
        policy_version=_integer(values["policy_version"], "policy_version", MAX_POLICY_VERSION),
        names=_strings(values["names"], "names"),
        dtypes=_strings(values["dtypes"], "dtypes"),
        shapes=tuple(
            tuple(_integer(size, "sizes", 2**63 - 1) for size in shape) for shape in shapes
        ),
        checksum=_integer(values["checksum"], "checksum", 2**32 - 1),
    )


def _integer(value: Any, name: str, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{name} of a manifest must be in 0..{largest}, got {value!r:.50}")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} of a manifest must be a list of strings")
    return tuple(value)


def verify(
    manifest: WeightManifest,
    expected: WeightLayout,
    *,
    current_version: int,
    checksum: int | None = None,
) -> None:
    """Check a version against what the engine has; without ``checksum``, before its bytes come.

    Args:
        manifest: as announced.
        expected: layout of the engine's parameters.
        current_version: that the engine runs; -1 for none.
        checksum: CRC-32 of the bytes that came.

    Raises:
        TransferRejected: naming the first difference.
    """
    version = manifest.policy_version
    if not current_version < version <= MAX_POLICY_VERSION:
        raise TransferRejected(
            f"policy version {version} is not above {current_version}, which the engine runs, "
            f"or is above {MAX_POLICY_VERSION}",
            retryable=False,
        )
    for field in ("names", "dtypes", "shapes"):
        offered, wanted = getattr(manifest, field), getattr(expected, field)
        if offered != wanted:
            raise TransferRejected(
                f"policy version {version}: {field} differ from the engine's: "
                + _first_difference(offered, wanted, expected.names),
                retryable=False,
            )
    if checksum is not None and checksum != manifest.checksum:
        raise TransferRejected(
            f"policy version {version} was damaged on its way: CRC-32 {checksum:#010x} instead of "
            f"{manifest.checksum:#010x}",
            retryable=True,
        )


def _first_difference(
    offered: tuple[Any, ...], wanted: tuple[Any, ...], names: tuple[str, ...]
) -> str:
    for name, got, want in zip(names, offered, wanted, strict=False):
        if got != want:
            return f"{got!r} instead of {want!r} at {name!r}"
    return f"{len(offered)} tensors instead of {len(wanted)}"
