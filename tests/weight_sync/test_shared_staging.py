import pytest
import torch

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.collective import CollectiveReceiver, CollectiveSender
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.sglang_loader import shared_payload
from skyrl_async.weight_sync.snapshot import SnapshotPool
from skyrl_async.weight_sync.staging import WeightStaging
from skyrl_async.weight_sync.transport import StagedWeights
from tests.weight_sync.other_process import checksum, process, told
from tests.weight_sync.peers import assert_same_bits, in_thread, make_parameters, soon


def open_payload(pipe):
    """Report what a payload holds, then write into it, as long as payloads come."""
    import base64
    import pickle

    while payload := pipe.recv():
        weights = dict(pickle.loads(base64.b64decode(payload)))
        pipe.send((list(weights), checksum(weights)))
        weights["norm.weight"].fill_(7)
        pipe.send("written")


def filled(parameters):
    buffer = FlatBuffer(WeightLayout.of(parameters), shared=True)
    for name, tensor in parameters:
        buffer.tensors[name].copy_(tensor)
    return buffer


def test_a_shared_buffer_holds_the_bytes_and_starts_with_zeros():
    parameters = make_parameters(num_floats=1_000)
    layout = WeightLayout.of(parameters)
    buffer = FlatBuffer(layout, shared=True)
    assert buffer.flat.numel() == layout.size_bytes and not buffer.flat.any()
    assert buffer.flat.is_shared() and all(t.is_shared() for t in buffer.tensors.values())
    assert not FlatBuffer(layout).flat.is_shared()
    for name, tensor in parameters:
        buffer.tensors[name].copy_(tensor)
    assert_same_bits(buffer.tensors, dict(parameters))
    other = FlatBuffer(layout)
    other.flat.copy_(buffer.flat)
    assert_same_bits(other.tensors, dict(parameters))


def test_another_process_opens_the_same_memory():
    parameters = make_parameters(num_floats=1_000)
    buffer = filled(parameters)
    with process(open_payload) as (_, pipe):
        pipe.send(shared_payload(buffer.tensors))
        assert told(pipe) == (list(dict(parameters)), checksum(dict(parameters)))
        assert told(pipe) == "written"
        # Not a copy: what it wrote is seen here, and what is written here is seen there.
        assert buffer.tensors["norm.weight"].eq(7).all()
        buffer.tensors["scale"].fill_(3)
        expected = checksum(buffer.tensors)
        pipe.send(shared_payload(buffer.tensors))
        assert told(pipe) == (list(dict(parameters)), expected)
        pipe.send(None)


def test_the_sharing_of_other_tensors_stays_as_it_was():
    before = torch.multiprocessing.get_sharing_strategy()
    shared_payload(filled(make_parameters(num_floats=1_000)).tensors)
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_memory_of_one_process_has_no_payload():
    buffer = FlatBuffer(WeightLayout.of(make_parameters(num_floats=1_000)))
    with pytest.raises(ValueError, match=r"embed\.weight.*shared buffer"):
        shared_payload(buffer.tensors)


NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("memory", "is_copied"),
    [
        ({}, False),
        ({"shared": True}, True),
        pytest.param({"pinned": True}, True, marks=NEEDS_CUDA),
    ],
)
def test_one_buffer_is_enough_where_it_is_copied_and_pointers_need_two(memory, is_copied):
    layout = WeightLayout.of(make_parameters(num_floats=1_000))
    staging = WeightStaging(layout, **memory)
    first = staging.free_buffer()
    assert first.flat.is_pinned() == ("pinned" in memory)
    assert staging.free_buffer() is first
    staging.commit(4)
    assert (staging.free_buffer() is first) == is_copied
    assert staging.policy_version == 4
    staging.admit(
        WeightManifest(
            policy_version=5,
            names=layout.names,
            dtypes=layout.dtypes,
            shapes=layout.shapes,
            checksum=0,
        )
    )


def test_versions_of_a_pair_arrive_in_one_shared_buffer(store):
    parameters = make_parameters(num_floats=1_000)
    pool = SnapshotPool(parameters, num_buffers=1)
    sender = CollectiveSender("engine", store=store)
    receiver = CollectiveReceiver(sender.address, expected=pool.layout, shared=True)
    places = set()
    for version in (1, 2, 3):
        snapshot = pool.take(version)
        sent = in_thread(lambda snapshot=snapshot: sender.send(snapshot, deadline=soon()))
        staged = receiver.receive(5.0)
        assert isinstance(staged, StagedWeights) and staged.policy_version == version
        assert_same_bits(staged.weights, dict(parameters))
        assert all(tensor.is_shared() for tensor in staged.weights.values())
        places.add(staged.weights["embed.weight"].data_ptr())
        receiver.acknowledge(staged, None)
        assert sent()[0].size_bytes == pool.layout.size_bytes
        snapshot.release()
        for _, tensor in parameters:
            tensor.add_(1)
    assert len(places) == 1
    sender.close()
    receiver.close()
