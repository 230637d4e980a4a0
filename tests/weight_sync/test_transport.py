import json
import random
import zlib
from dataclasses import replace

import pytest
import torch

from skyrl_async.types import WeightManifest
from skyrl_async.weight_sync.layout import FlatBuffer
from skyrl_async.weight_sync.snapshot import SnapshotPool, WeightSnapshot
from skyrl_async.weight_sync.staging import WeightStaging
from skyrl_async.weight_sync.transport import (
    MAX_POLICY_VERSION,
    TransferRejected,
    decode_manifest,
    encode_manifest,
    verify,
)
from tests.weight_sync.peers import make_parameters


def take(policy_version: int = 5) -> WeightSnapshot:
    return SnapshotPool(make_parameters(num_floats=100)).take(policy_version)


def swapped(values: tuple, first: int, second: int) -> tuple:
    items = list(values)
    items[first], items[second] = items[second], items[first]
    return tuple(items)


def test_manifest_survives_json() -> None:
    manifest = take().manifest()
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert manifest.shapes[3] == ()


@pytest.mark.parametrize(
    "change",
    [
        {"policy_version": -1},
        {"policy_version": MAX_POLICY_VERSION + 1},
        {"policy_version": True},
        {"policy_version": 1.0},
        {"policy_version": "1"},
        {"names": "abc"},
        {"names": ["a"]},
        {"names": [1, 2, 3, 4, 5]},
        {"shapes": [[1], [2], [3], [4], [-1]]},
        {"shapes": [[1], [2], [3], [4], 5]},
        {"checksum": 2**32},
        {"checksum": None},
        {"extra": 1},
    ],
)
def test_malformed_manifests_are_refused(change: dict) -> None:
    fields = json.loads(encode_manifest(take().manifest()))
    with pytest.raises(ValueError, match="manifest"):
        decode_manifest(json.dumps(fields | change))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"policy_version":1}', b"\xff\xfe"])
def test_what_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        decode_manifest(text)


def test_first_difference_is_named() -> None:
    snapshot = take()
    manifest, layout = snapshot.manifest(), snapshot.layout

    def reason(**changes: object) -> str:
        with pytest.raises(TransferRejected) as caught:
            verify(replace(manifest, **changes), layout, current_version=4)  # type: ignore[arg-type]
        assert not caught.value.retryable
        return str(caught.value)

    names, dtypes, shapes = manifest.names, manifest.dtypes, manifest.shapes
    fewer = {"names": names[:-1], "dtypes": dtypes[:-1], "shapes": shapes[:-1]}
    assert "4 tensors instead of 5" in reason(**fewer)
    assert "'embed.weight' instead" not in reason(names=("x", *names[1:]))
    assert "'x' instead of 'embed.weight'" in reason(names=("x", *names[1:]))
    assert "names differ" in reason(names=swapped(names, 0, 1))
    assert "'float16' instead of 'bfloat16' at 'head.weight'" in reason(
        dtypes=(*dtypes[:2], "float16", *dtypes[3:])
    )
    assert "(5, 33) instead of (33, 5) at 'head.weight'" in reason(
        shapes=(*shapes[:2], (5, 33), *shapes[3:])
    )


def test_versions_only_rise_under_ten_thousand_random_announcements() -> None:
    manifest = take().manifest()
    staging = WeightStaging(take().layout, policy_version=7)
    draw = random.Random(0)
    history = [7]
    refused = 0
    for _ in range(10_000):
        near = history[-1] + draw.randint(-5, 2)
        far = draw.choice([-1, 0, 2**31, 2**63, draw.choice(history)])
        version = near if draw.random() < 0.7 else far
        fields = json.loads(encode_manifest(manifest)) | {"policy_version": version}
        try:
            staging.admit(decode_manifest(json.dumps(fields)))
        except (ValueError, TransferRejected):
            refused += 1
            assert not history[-1] < version < 2**31
            continue
        staging.commit(version)
        history.append(version)
    assert history == sorted(set(history)) and len(history) > 500 and refused > 5_000


def test_every_one_of_a_thousand_flipped_bits_is_detected() -> None:
    snapshot = take()
    manifest: WeightManifest = snapshot.manifest()
    received = FlatBuffer(snapshot.layout)
    received.flat.copy_(snapshot.flat)
    verify(manifest, snapshot.layout, current_version=4, checksum=zlib.crc32(received.data))
    draw = random.Random(0)
    for _ in range(1_000):
        place, bit = draw.randrange(snapshot.layout.size_bytes), 1 << draw.randrange(8)
        received.flat[place] ^= bit
        with pytest.raises(TransferRejected, match="damaged") as caught:
            verify(manifest, snapshot.layout, current_version=4, checksum=zlib.crc32(received.data))
        assert caught.value.retryable
        received.flat[place] ^= bit
    assert torch.equal(received.flat, snapshot.flat)


def test_staging_never_offers_the_buffer_that_is_live() -> None:
    snapshot = take()
    staging = WeightStaging(snapshot.layout)
    first = staging.free_buffer()
    assert staging.free_buffer() is first
    staging.commit(1)
    second = staging.free_buffer()
    assert second is not first
    staging.commit(2)
    assert staging.free_buffer() is first
