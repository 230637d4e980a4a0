import pytest
import torch

from skyrl_async.weight_sync.layout import ALIGNMENT_BYTES, WeightLayout
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.weight_sync.peers import assert_same_bits, make_parameters


def test_snapshot_has_the_bits_of_the_weights_and_does_not_follow_them() -> None:
    parameters = make_parameters()
    original = {name: tensor.clone() for name, tensor in parameters}
    snapshot = SnapshotPool(parameters).take(3)
    for _, tensor in parameters:
        tensor.zero_()
    assert snapshot.policy_version == snapshot.manifest().policy_version == 3
    assert_same_bits(snapshot.tensors, original)


def test_snapshot_of_trainable_parameters_needs_no_gradient() -> None:
    model = torch.nn.Linear(4, 3)
    pool = SnapshotPool(model.named_parameters())
    with torch.no_grad():
        model.weight.add_(1)
    snapshot = pool.take(1)
    assert_same_bits(snapshot.tensors, dict(model.named_parameters()))
    assert not any(tensor.requires_grad for tensor in snapshot.tensors.values())


def test_tied_parameters_appear_once_under_their_first_name() -> None:
    shared = torch.randn(4, 6)
    layout = SnapshotPool([("a", shared), ("b", shared), ("c", shared.view(4, 6))]).layout
    assert layout.names == ("a",)
    assert WeightLayout.of([("a", shared), ("row", shared[0])]).names == ("a", "row")


def test_published_type_replaces_floating_types_only() -> None:
    parameters = make_parameters()
    snapshot = SnapshotPool(parameters, dtype=torch.bfloat16).take(0)
    expected = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in parameters}
    assert_same_bits(snapshot.tensors, expected)
    assert snapshot.manifest().dtypes == ("bfloat16",) * 4 + ("int64",)


def test_tensors_lie_aligned_and_padding_is_zero() -> None:
    snapshot = SnapshotPool(make_parameters()).take(0)
    layout = snapshot.layout
    assert all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in snapshot.tensors.values())
    padded = snapshot.flat.clone()
    for offset, tensor in zip(layout.offsets, snapshot.tensors.values(), strict=True):
        padded[offset : offset + tensor.numel() * tensor.itemsize] = 0
    assert layout.size_bytes == snapshot.flat.numel() and not padded.any()


def test_three_buffers_are_reused_and_a_fourth_snapshot_is_an_error() -> None:
    pool = SnapshotPool(make_parameters())
    snapshots = [pool.take(version) for version in range(3)]
    assert len({snapshot.flat.data_ptr() for snapshot in snapshots}) == 3
    with pytest.raises(RuntimeError, match="all 3 snapshots are in use"):
        pool.take(3)
    freed = snapshots[1].flat.data_ptr()
    snapshots[1].release()
    snapshots[1].release()
    assert pool.take(3).flat.data_ptr() == freed
    with pytest.raises(RuntimeError, match="in use"):
        pool.take(4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to publish"):
        SnapshotPool([])
    with pytest.raises(ValueError, match="'a' comes twice"):
        SnapshotPool([("a", torch.zeros(1)), ("a", torch.zeros(2))])
    with pytest.raises(ValueError, match="num_buffers"):
        SnapshotPool(make_parameters(), num_buffers=0)
    with pytest.raises(ValueError, match="policy_version"):
        SnapshotPool(make_parameters()).take(-1)
