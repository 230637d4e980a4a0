"""Weights through a folder: the reference transport, for any engine that can read safetensors.

One folder per engine. A version is a folder ``transfer-<sequence>`` with ``weights.safetensors``
and ``manifest.json``; it is written under a temporary name, synced, renamed and its parent synced,
so that it is there completely or not at all, also after a power cut. The receiver polls for the
newest one and answers in ``answer-<sequence>.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.snapshot import WeightSnapshot
from skyrl_async.weight_sync.staging import WeightStaging
from skyrl_async.weight_sync.transport import (
    EngineLost,
    LearnerLost,
    StagedWeights,
    TransferRejected,
    TransferReport,
    decode_manifest,
    encode_manifest,
)

_PARTIAL = ".partial-"
_TRANSFER = "transfer-"
_ANSWER = "answer-"
_WEIGHTS_FILE = "weights.safetensors"
_MANIFEST_FILE = "manifest.json"


class DiskSender:
    """Writes versions into a folder; see :class:`WeightSender`.

    Args:
        folder: of this engine alone; made if missing, leftovers of a killed sender are removed.
        keep: newest versions to keep.
        poll_interval_s: between two looks for the answer.

    Raises:
        ValueError: if ``keep`` is not positive.
    """

    def __init__(self, folder: Path, *, keep: int = 2, poll_interval_s: float = 0.01) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self._folder = folder
        self._keep = keep
        self._poll_interval_s = poll_interval_s
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(_PARTIAL + "*"):
            _remove(leftover)
        self._sequence = max(_sequences(folder, _TRANSFER), default=0)

    def send(self, snapshot: WeightSnapshot, *, deadline: float) -> TransferReport:
        """Write ``snapshot`` and wait for the answer, as :class:`WeightSender` says.

        A full disk rejects the transfer: earlier versions stay, and a later one may find space.
        """
        started = time.monotonic()
        self._sequence += 1
        try:
            _write_version(self._folder, self._sequence, snapshot)
        except (OSError, SafetensorError) as error:
            _remove(self._folder / f"{_PARTIAL}{self._sequence:08d}")
            raise TransferRejected(f"{self._folder}: {error}", retryable=True) from error
        self._prune()
        written = time.monotonic()
        answer = self._answer(deadline)
        if answer["error"] is not None:
            raise TransferRejected(str(answer["error"]), retryable=bool(answer["retryable"]))
        return TransferReport(
            size_bytes=snapshot.layout.size_bytes,
            transfer_s=written - started,
            load_s=time.monotonic() - written,
        )

    def _answer(self, deadline: float) -> dict[str, Any]:
        path = self._folder / f"{_ANSWER}{self._sequence:08d}.json"
        while not path.exists():
            if time.monotonic() >= deadline:
                self.close()
                raise EngineLost(f"no answer in {path} before the deadline")
            if self._closed.wait(self._poll_interval_s):
                raise EngineLost(f"the sender of {self._folder} was closed")
        return json.loads(path.read_bytes())

    def _prune(self) -> None:
        for kind in (_TRANSFER, _ANSWER):
            for sequence, path in _sequences(self._folder, kind).items():
                if sequence <= self._sequence - self._keep:
                    _remove(path)

    def close(self) -> None:
        """Stop waiting; a blocked ``send`` raises ``EngineLost`` at once."""
        self._closed.set()


class DiskReceiver:
    """Reads the newest version of a folder; see :class:`WeightReceiverTransport`.

    A receiver that starts late finds the newest version at once.

    Args:
        folder: of the sender.
        expected: layout of the engine's parameters, ``WeightLayout.of(model.named_parameters())``.
        policy_version: that the engine runs now; -1 if its weights count for nothing.
        poll_interval_s: between two looks into the folder.
        shared: stage into named shared memory, for an engine in another process.
        pinned: stage into page-locked memory, for an engine on a GPU.
    """

    def __init__(
        self,
        folder: Path,
        *,
        expected: WeightLayout,
        policy_version: int = -1,
        poll_interval_s: float = 0.02,
        shared: bool = False,
        pinned: bool = False,
    ) -> None:
        self._folder = folder
        self._staging = WeightStaging(
            expected, policy_version=policy_version, shared=shared, pinned=pinned
        )
        self._poll_interval_s = poll_interval_s
        self._sequence = 0
        self._closed = threading.Event()

    def receive(self, timeout_s: float) -> StagedWeights | None:
        """Wait for a newer version and verify it, as :class:`WeightReceiverTransport` says."""
        deadline = time.monotonic() + timeout_s
        while not self._closed.is_set():
            transfers = _sequences(self._folder, _TRANSFER)
            newest = max(transfers, default=0)
            if newest > self._sequence:
                self._sequence = newest
                return self._stage(transfers[newest])
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._closed.wait(min(remaining, self._poll_interval_s))
        raise LearnerLost(f"the receiver of {self._folder} was closed")

    def _stage(self, transfer: Path) -> StagedWeights | None:
        buffer = self._staging.free_buffer()
        try:
            manifest = decode_manifest((transfer / _MANIFEST_FILE).read_bytes())
            self._staging.admit(manifest)
            _read_weights(transfer / _WEIGHTS_FILE, manifest, buffer)
            self._staging.admit(manifest, checksum=zlib.crc32(buffer.data))
        except TransferRejected as rejection:
            self._reply(str(rejection), retryable=rejection.retryable)
            return None
        except (OSError, ValueError, SafetensorError) as error:
            self._reply(f"{transfer.name} is unreadable: {error}", retryable=True)
            return None
        return StagedWeights(
            policy_version=manifest.policy_version,
            weights=buffer.tensors,
            deadline=time.monotonic(),
        )

    def acknowledge(self, staged: StagedWeights, error: str | None) -> None:
        """Say that the engine runs ``staged``, or why not, as the protocol says."""
        if error is None:
            self._staging.commit(staged.policy_version)
        self._reply(error, retryable=error is not None)

    def _reply(self, error: str | None, *, retryable: bool) -> None:
        name = f"{_ANSWER}{self._sequence:08d}.json"
        partial = self._folder / f".{name}"
        try:
            partial.write_text(json.dumps({"error": error, "retryable": retryable}))
            partial.rename(self._folder / name)
        except OSError as reason:
            raise LearnerLost(f"{self._folder} takes no answer: {reason}") from reason

    def close(self) -> None:
        """Stop polling; a blocked ``receive`` raises ``LearnerLost`` at once."""
        self._closed.set()


def _write_version(folder: Path, sequence: int, snapshot: WeightSnapshot) -> None:
    partial = folder / f"{_PARTIAL}{sequence:08d}"
    partial.mkdir()
    save_file(dict(snapshot.tensors), partial / _WEIGHTS_FILE)
    (partial / _MANIFEST_FILE).write_text(encode_manifest(snapshot.manifest()))
    for path in (partial / _WEIGHTS_FILE, partial / _MANIFEST_FILE, partial):
        _sync(path)
    partial.rename(folder / f"{_TRANSFER}{sequence:08d}")
    _sync(folder)


def _read_weights(path: Path, manifest: WeightManifest, buffer: FlatBuffer) -> None:
    """Copy a file into ``buffer``.

    Raises:
        ValueError: if names, dtypes or shapes are not those of the manifest.
    """
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(manifest.names):
            raise ValueError("the names in the file are not those of the manifest")
        for name, view in buffer.tensors.items():
            tensor = file.get_tensor(name)
            if tensor.dtype != view.dtype or tensor.shape != view.shape:
                raise ValueError(
                    f"{name!r} is {tensor.dtype} {tuple(tensor.shape)} in the file, "
                    f"{view.dtype} {tuple(view.shape)} in the manifest"
                )
            view.copy_(tensor)


def _sequences(folder: Path, kind: str) -> dict[int, Path]:
    """Return the entries of one kind by sequence number."""
    found = {}
    for path in folder.glob(kind + "*"):
        digits = path.stem.removeprefix(kind)
        if digits.isdecimal():
            found[int(digits)] = path
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
