import asyncio
import copy

import pytest
import torch

from skyrl_async.learner.lora import LoraSettings, adapter_parameters, add_adapter
from skyrl_async.learner.lora_merge import AdapterMerger
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.rollout.weight_exchange import exchange_parameters
from skyrl_async.types import Sampling
from tests.models.families import family_model
from tests.rollout.embedded_engine_cases import (
    TOLERANCE,
    deviation,
    play_while_swapping,
    running,
    versions_of,
    weights_of,
)
from tests.rollout.fake_device import FAKE, FakeDevice, FakeTensor, moved


def test_the_fake_device_refuses_what_a_real_one_refuses():
    with FakeDevice() as device:
        there = torch.arange(6.0, device=FAKE).view(2, 3)
        assert there.device == FAKE and isinstance(there, FakeTensor)
        with pytest.raises(RuntimeError, match="in host memory"):
            there + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="in host memory"):
            there[torch.tensor([0])]
        assert not device.waits
        back = (there * 2).to("cpu")
        assert type(back) is torch.Tensor and back.tolist() == [[0, 2, 4], [6, 8, 10]]
        assert there.sum().item() == 15
        assert sum(device.waits.values()) == 2


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral_window"])
def test_nothing_of_the_engine_stays_on_the_cpu(family):
    models = versions_of(family_model(family), count=3)

    async def scenario():
        with FakeDevice():
            model = moved(copy.deepcopy(models[0]))
            async with running(model, max_prefill_tokens=30) as engine:
                # New weights come in host memory, as a receiver stages them.
                return await play_while_swapping(engine, models, sessions=6)

    generations = asyncio.run(scenario())
    assert {v for _, g in generations for v in g.policy_versions.tolist()} == {0, 1, 2}
    assert max(deviation(models, *pair) for pair in generations) <= TOLERANCE


def test_the_host_waits_once_for_every_decode_step():
    async def scenario(sampling):
        with FakeDevice() as device:
            model = moved(family_model("qwen3"))
            async with running(model) as engine:
                device.waits.clear()
                calls = [
                    engine.generate([3, 4, 5 + i % 3], sampling, request_id=str(i))
                    for i in range(12)
                ]
                await asyncio.gather(*calls)
                return engine.take_stats().decode_steps, device.waits

    for options in ({}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.9, "top_k": 4}):
        steps, waits = asyncio.run(scenario(Sampling(max_tokens=6, **options)))
        assert sum(waits.values()) == steps > 10, waits


def test_the_tokens_do_not_depend_on_the_device():
    async def scenario(model):
        async with running(model, seed=5) as engine:
            calls = [
                engine.generate([i, 7], Sampling(max_tokens=12), request_id=str(i))
                for i in range(8)
            ]
            return [g.token_ids.tolist() for g in await asyncio.gather(*calls)]

    with FakeDevice():
        there = asyncio.run(scenario(moved(family_model("qwen3"))))
    assert there == asyncio.run(scenario(family_model("qwen3")))


def test_weights_in_host_memory_are_copied_into_the_parameters():
    with FakeDevice():
        model = moved(family_model("qwen3"))
        places = {name: p.inner.data_ptr() for name, p in model.named_parameters()}
        new = weights_of(family_model("qwen3", seed=1))
        exchange_parameters(model, new)
        for name, parameter in model.named_parameters():
            assert parameter.inner.data_ptr() == places[name]
            assert torch.equal(parameter.inner, new[name])
        # They are free at once.
        before = model.lm_head.weight.inner.clone()
        for tensor in new.values():
            tensor.zero_()
        assert torch.equal(model.lm_head.weight.inner, before)


def test_adapters_are_merged_on_the_device_and_exchanged_there():
    plain = family_model("qwen3")
    adapted = add_adapter(copy.deepcopy(plain), LoraSettings(rank=2, alpha=4))
    adapter = {n: torch.randn(p.shape) * 0.1 for n, p in adapter_parameters(adapted)}
    expected = AdapterMerger(plain, scale=2.0).merge(adapter)
    with FakeDevice() as device:
        model = moved(copy.deepcopy(plain))
        merger = AdapterMerger(model, scale=2.0)
        merged = merger.merge(adapter)
        assert not device.waits
        assert all(isinstance(weight, FakeTensor) for weight in merged.values())
        exchange_parameters(model, merged)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.inner, expected[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_on_a_gpu_has_the_logprobs_of_plain_passes(dtype):
    models = versions_of(family_model("qwen3").to(dtype), count=3)
    for model in models:
        model.cuda()

    async def scenario():
        model = copy.deepcopy(models[0])
        async with running(model) as engine:
            pinned = [
                {n: t.cpu().pin_memory() for n, t in weights_of(m).items()} for m in models[1:]
            ]
            replies = []
            for version in range(3):
                if version:
                    await engine.load_weights(pinned[version - 1], policy_version=version)
                calls = [
                    engine.generate([3, i], Sampling(max_tokens=30), request_id=str(i))
                    for i in range(8)
                ]
                replies += zip(
                    [[3, i] for i in range(8)], await asyncio.gather(*calls), strict=True
                )
            return replies

    tolerance = 1e-3 if dtype is torch.float32 else 0.5
    replies = asyncio.run(scenario())
    for model in models:
        model.cpu()
    assert max(deviation(models, *pair) for pair in replies) <= tolerance


def test_an_engine_of_a_model_in_parts_on_two_devices_is_not_made():
    with FakeDevice():
        model = family_model("qwen3")
        moved(model.model.layers[1])
        with pytest.raises(RuntimeError, match="in host memory"):
            EmbeddedEngine(model, max_concurrent=1, context_length=32)
