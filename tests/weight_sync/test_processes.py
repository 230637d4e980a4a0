import os
import signal
import time

import pytest
import torch.distributed as dist

from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.layout import WeightLayout
from skyrl_async.weight_sync.publisher import EngineEvent, EngineStatus, WeightPublisher
from skyrl_async.weight_sync.transport import LearnerLost, StagedWeights
from tests.weight_sync.other_process import (
    BUCKET_BYTES,
    checksum,
    process,
    run_engine,
    run_learner,
    told,
)
from tests.weight_sync.peers import Pair, assert_same_bits, make_parameters

TIMEOUT_S = 1.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_engine_process_lost_in_mid_transfer_loses_only_itself(
    store: dist.TCPStore, number: signal.Signals
) -> None:
    parameters = make_parameters()
    events: list[EngineEvent] = []
    remote = CollectiveSender("remote", store=store, bucket_bytes=BUCKET_BYTES)
    with (
        process(run_engine, remote.address, number, 1) as (child, pipe),
        Pair(store, parameters) as local,
    ):
        senders = {"remote": remote, "local": local.sender}
        # The first send waits until the engine has started, so it must not have the short deadline.
        start = WeightPublisher(senders, timeout_s=20)
        start.publish(local.pool.take(0))
        assert told(pipe) == ("loaded", 0, checksum(dict(parameters)))
        assert start.wait_idle(5) and start.engine_versions == {"remote": 0, "local": 0}

        publisher = WeightPublisher(senders, timeout_s=TIMEOUT_S, on_event=events.append)
        started = time.monotonic()
        publisher.publish(local.pool.take(1))
        assert told(pipe) == ("signal", 1)
        for version in (2, 3):
            for _, tensor in parameters:
                tensor.add_(1)
            publisher.publish(local.pool.take(version))
        assert publisher.wait_idle(10)
        lost_within_s = TIMEOUT_S if number == signal.SIGKILL else 2 * TIMEOUT_S
        assert time.monotonic() - started < lost_within_s
        assert [e.status for e in events if e.engine_id == "remote"] == [EngineStatus.LOST]
        assert publisher.take_stats().lost_engines == ("remote",)
        assert local.engine.loaded[:2] == [0, 1] and local.engine.loaded[-1] == 3
        assert_same_bits(local.engine.live, dict(parameters))
        if number == signal.SIGSTOP:
            # It wakes up to a closed pair, and the version in its hands is not loaded.
            os.kill(child.pid, signal.SIGCONT)
            assert told(pipe) == ("end", "LearnerLost")
            child.join(5)
            assert child.exitcode == 0
        publisher.close()
        start.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_learner_process_lost_in_mid_transfer_leaves_the_old_version(
    number: signal.Signals,
) -> None:
    parameters = make_parameters()
    with process(run_learner, number) as (_, pipe):
        receiver = CollectiveReceiver(told(pipe), expected=WeightLayout.of(parameters))
        staged = receiver.receive(10.0)
        assert isinstance(staged, StagedWeights) and staged.policy_version == 0
        receiver.acknowledge(staged, None)
        kept = {name: tensor.clone() for name, tensor in staged.weights.items()}
        started = time.monotonic()
        if number == signal.SIGKILL:
            with pytest.raises(LearnerLost):
                assert receiver.receive(10.0) is None
                receiver.receive(10.0)
        else:
            assert receiver.receive(10.0) is None
        assert time.monotonic() - started < 2.0
        assert told(pipe) == ("signal", 1)
        assert_same_bits(staged.weights, kept)
        assert_same_bits(kept, dict(parameters))
        started = time.monotonic()
        receiver.close()
        assert time.monotonic() - started < 0.5
