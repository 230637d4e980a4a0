"""Loading adapters into a server, and which of them it has afterwards."""

import asyncio
import contextlib
from collections import deque

import pytest
import torch

from skyrl_async.weight_sync import sglang_adapters
from skyrl_async.weight_sync.sglang_adapters import AdapterLoader, AdapterSettings, check_adapter
from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from skyrl_async.weight_sync.sglang_loader import EngineBroken
from tests.weight_sync.fake_adapters import FakeAdapterServer
from tests.weight_sync.fake_server import ADMIN_KEY
from tests.weight_sync.peers import assert_same_bits

RANK = 4
LAYERS = ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")


def adapter_of(seed, *, rank=RANK):
    generator = torch.Generator().manual_seed(seed)
    shapes = {".lora_A.weight": (rank, 6), ".lora_B.weight": (10, rank)}
    return {
        f"base_model.model.model.{layer}{side}": torch.randn(shape, generator=generator)
        for layer in LAYERS
        for side, shape in shapes.items()
    }


@contextlib.asynccontextmanager
async def serving(tmp_path, *, kv="recompute", rank=RANK):
    """A fake server, and a loader of it."""
    async with FakeAdapterServer(rank=RANK) as server:
        control = SglangControl(url=server.url, admin_key=ADMIN_KEY)
        try:
            yield server, loader_of(control, tmp_path, kv=kv, rank=rank)
        finally:
            await control.close()
            assert list(tmp_path.iterdir()) == [], "folders are gone"


def loader_of(control, tmp_path, *, kv="recompute", rank=RANK):
    return AdapterLoader(
        control,
        settings=AdapterSettings(rank=rank, alpha=8.0),
        kv_after_swap=kv,
        name_of=lambda version: f"v{version}",
        is_ours=lambda name: name.startswith("v"),
        scratch=tmp_path,
    )


async def load(loader, version, **options):
    values = {"policy_version": version, "timeout_s": 5.0, **options}
    return await loader.load(adapter_of(version), **values)


def test_an_adapter_is_loaded_under_the_name_of_its_version(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            report = await load(loader, 7)
            assert report.policy_version == 7
            assert report.stall_s > 0 and report.prepare_s > 0
            assert_same_bits(server.loaded["v7"], adapter_of(7))
            config = server.configs["v7"]
            assert (config["r"], config["lora_alpha"]) == (RANK, 8.0)
            assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
            assert server.calls == ["load v7", "abort"], "requests go on with the new one"

    asyncio.run(scenario())


@pytest.mark.parametrize(("kv", "kept"), [("recompute", 2), ("keep", 4)])
def test_the_newest_stay_loaded_and_older_ones_are_unloaded(kv, kept, tmp_path):
    async def scenario():
        async with serving(tmp_path, kv=kv) as (server, loader):
            server.loaded["somebody's"] = {}
            for version in range(10):
                await load(loader, version)
                ours = [f"v{v}" for v in range(max(0, version - kept + 1), version + 1)]
                assert list(server.loaded) == ["somebody's", *ours]
                assert loader.loaded == tuple(ours)
            assert server.calls.count("abort") == (10 if kv == "recompute" else 0)

    asyncio.run(scenario())


def test_requests_that_need_an_old_adapter_are_ended_after_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang_adapters, "_GRACE_S", 0.05)

    async def scenario():
        async with serving(tmp_path, kv="keep") as (server, loader):
            for version in range(4):
                await load(loader, version)
            server.needed = {"v0", "v3"}
            await load(loader, 4)
            assert server.calls[-3:] == ["load v4", "unload v0", "abort"]
            assert list(server.loaded) == ["v1", "v2", "v3", "v4"]

    asyncio.run(scenario())


def test_a_name_from_before_is_replaced_and_other_old_ones_are_unloaded(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            for version in (5, 6):
                await load(loader, version)
            again = loader_of(loader._control, tmp_path)
            changed = adapter_of(60)
            await again.load(changed, policy_version=6, timeout_s=5)
            assert list(server.loaded) == ["v6"]
            assert_same_bits(server.loaded["v6"], changed)

    asyncio.run(scenario())


def test_a_version_that_is_loaded_twice_is_loaded_once_in_the_end(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            for version in (4, 5, 5):
                await load(loader, version)
            assert loader.loaded == ("v4", "v5") and list(server.loaded) == ["v4", "v5"]

    asyncio.run(scenario())


def test_a_refusal_leaves_all_as_it_was(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            await load(loader, 1)
            server.calls.clear()
            server.faults["load"] = deque(["refuse", "refuse"])
            with pytest.raises(ControlError, match="a reason of its own"):
                await load(loader, 2)
            assert list(server.loaded) == ["v1"] and "abort" not in server.calls
            await load(loader, 3)
            assert list(server.loaded) == ["v1", "v3"]

    asyncio.run(scenario())


def test_an_adapter_that_the_server_does_not_name_is_not_taken_for_loaded(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            server.faults["load"] = deque(["forget"])
            with pytest.raises(ControlError, match="took the adapter 'v1', but names only"):
                await load(loader, 1)
            assert loader.loaded == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("endpoint", ["load", "abort", "unload"])
def test_a_server_that_does_not_answer_is_broken(endpoint, tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            await load(loader, 1)
            await load(loader, 2)
            server.faults[endpoint] = deque(["hang"])
            with pytest.raises(EngineBroken, match="not answered"):
                await load(loader, 3, timeout_s=0.3)

    asyncio.run(scenario())


def test_a_cancelled_load_leaves_no_folder_and_no_task(tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            server.faults["load"] = deque(["hang"])
            loading = asyncio.create_task(load(loader, 1))
            async with asyncio.timeout(5):
                while not server.calls:
                    await asyncio.sleep(0.001)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert len(asyncio.all_tasks()) <= 3, "of the fake server, and this one"

    asyncio.run(scenario())


def changed(**tensors):
    adapter = adapter_of(0)
    for name, tensor in tensors.items():
        key = next(key for key in adapter if key.endswith(name.replace("__", ".")))
        adapter[key] = tensor
    return adapter


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({}, "at least one adapted layer"),
        (changed(down_proj__lora_A__weight=torch.zeros(3, 6)), r"shape \(3, 6\), not that of rank"),
        (changed(down_proj__lora_B__weight=torch.zeros(10, 5)), r"shape \(10, 5\), not that of"),
        (changed(q_proj__lora_A__weight=torch.zeros(RANK)), "shape"),
        ({**adapter_of(0), "x.lora_A.weight": torch.zeros(RANK, 6)}, "but not 'x.lora_B.weight'"),
        ({**adapter_of(0), "x.lora_B.weight": torch.zeros(6, RANK)}, "but not 'x.lora_A.weight'"),
        ({**adapter_of(0), "lm_head.weight": torch.zeros(6, 6)}, "'lm_head.weight' is no side"),
    ],
)
def test_wrong_adapters_are_refused_before_the_server_sees_them(adapter, text, tmp_path):
    async def scenario():
        async with serving(tmp_path) as (server, loader):
            with pytest.raises(ValueError, match=text):
                await loader.load(adapter, policy_version=1, timeout_s=5)
            assert server.calls == []

    asyncio.run(scenario())


def test_a_larger_rank_than_the_server_was_started_for_is_its_refusal(tmp_path):
    async def scenario():
        async with serving(tmp_path, rank=8) as (server, loader):
            with pytest.raises(ControlError, match="rank 8 is incompatible"):
                await loader.load(adapter_of(0, rank=8), policy_version=1, timeout_s=5)
            assert server.loaded == {}

    asyncio.run(scenario())


def test_the_layers_of_an_adapter_are_named_once():
    assert check_adapter(adapter_of(0), rank=RANK) == ("down_proj", "q_proj", "v_proj")


@pytest.mark.parametrize("values", [{"rank": 0, "alpha": 1.0}, {"rank": 1, "alpha": 0.0}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="must be > 0"):
        AdapterSettings(**values)
