import ast
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender, PairAddress
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.publisher import EngineEvent, EngineStatus, WeightPublisher
from skyrl_async.weight_sync.transport import LearnerLost, StagedWeights
from tests.weight_sync.other_process import BUCKET_BYTES, vars_of
from tests.weight_sync.peers import Pair, Parameters, assert_same_bits, make_parameters

TIMEOUT_S = 1.0


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.weight_sync.other_process", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=5)


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    text = child.stdout.readline().strip()
    if not text:
        assert child.stderr is not None
        raise AssertionError(f"the process ended: {child.stderr.read()}")
    return text


def checksum(parameters: Parameters) -> int:
    total = 0
    for _, tensor in parameters:
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return total


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_engine_process_lost_in_mid_transfer_loses_only_itself(
    store: dist.TCPStore, name: str
) -> None:
    parameters = make_parameters()
    events: list[EngineEvent] = []
    remote = CollectiveSender("remote", store=store, bucket_bytes=BUCKET_BYTES)
    with (
        process("engine", str(vars_of(remote.address)), name, "1") as child,
        Pair(store, parameters) as local,
    ):
        # A publish waits for an engine to start, so the first deadline includes Python's imports.
        publisher = WeightPublisher(
            {"remote": remote, "local": local.sender}, timeout_s=20, on_event=events.append
        )
        publisher.publish(local.pool.take(0))
        assert line(child) == f"loaded 0 {checksum(parameters)}"
        assert publisher.wait_idle(5)
        publisher._timeout_s = TIMEOUT_S
        started = time.monotonic()
        publisher.publish(local.pool.take(1))
        assert line(child) == "signal 1"
        for version in (2, 3):
            for _, tensor in parameters:
                tensor.add_(1)
            publisher.publish(local.pool.take(version))
        assert publisher.wait_idle(10)
        seconds = time.monotonic() - started
        assert seconds < (TIMEOUT_S if name == "SIGKILL" else 2 * TIMEOUT_S)
        assert [e.status for e in events if e.engine_id == "remote"] == [
            EngineStatus.LOADED,
            EngineStatus.LOST,
        ]
        assert local.engine.loaded[:2] == [0, 1] and local.engine.loaded[-1] == 3
        assert_same_bits(local.engine.live, dict(parameters))
        assert publisher.take_stats().lost_engines == ("remote",)
        if name == "SIGSTOP":
            # It wakes up to a closed pair: the version in its hands is not loaded any more.
            child.send_signal(signal.SIGCONT)
            assert line(child) == "end LearnerLost"
            assert child.wait(5) == 0
        publisher.close()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_learner_process_lost_in_mid_transfer_leaves_the_old_version(name: str) -> None:
    parameters = make_parameters()
    with process("learner", name) as child:
        address = PairAddress(**ast.literal_eval(line(child)))
        layout = WeightLayout.of(parameters)
        receiver = CollectiveReceiver(address, expected=layout)
        staged = receiver.receive(10.0)
        assert isinstance(staged, StagedWeights) and staged.policy_version == 0
        receiver.acknowledge(staged, None)
        kept = {name: tensor.clone() for name, tensor in staged.weights.items()}
        started = time.monotonic()
        if name == "SIGKILL":
            with pytest.raises(LearnerLost):
                assert receiver.receive(10.0) is None
                receiver.receive(10.0)
        else:
            assert receiver.receive(10.0) is None
        assert line(child) == "signal 1"
        assert time.monotonic() - started < 2.0
        assert_same_bits(staged.weights, kept)
        assert_same_bits(kept, dict(parameters))
        started = time.monotonic()
        receiver.close()
        assert time.monotonic() - started < 0.5
