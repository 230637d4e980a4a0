"""A real SGLang server takes the weights that are published for each family."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch

from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
from skyrl_async.rollout.engine_process import EngineProcess, ServerSettings
from skyrl_async.weight_sync.export_names import export_names
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.sglang_control import SglangControl
from skyrl_async.weight_sync.sglang_loader import SglangLoader
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.models.families import family_model
from tests.sglang_server import START_TIMEOUT_S
from tests.weight_sync.real_server import CONTEXT, TOLERANCE, Reply

pytest_plugins = ("tests.sglang_server",)

NUM_TOKENS = 40


def plain_logprobs(model, token_ids):
    with torch.inference_mode():
        logits = model(torch.tensor([[*CONTEXT, *token_ids]])).logits[0, len(CONTEXT) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def deviation(models, reply):
    worst = 0.0
    for label in set(reply.versions):
        plain = plain_logprobs(models[label], reply.token_ids)
        own = torch.tensor([version == label for version in reply.versions])
        worst = max(worst, float((plain - torch.tensor(reply.logprobs))[own].abs().max()))
    return worst


async def loads_versions(server, model):
    """Load three versions, one of them under a running request; return all deviations."""
    names = export_names(model)
    published = list(names.publish(model.named_parameters()))
    pool = SnapshotPool(published, num_buffers=1)
    # The worker beside the server knows only the model's configuration.
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    expected = WeightLayout.of(export_names(skeleton).publish(skeleton.named_parameters()))
    assert pool.layout == expected
    staging = FlatBuffer(expected, shared=True)
    control = SglangControl(url=server.url, admin_key=server.admin_key)
    loader = SglangLoader(control, kv_after_swap="recompute", way="memory")
    models = {"unverified": copy.deepcopy(model)}
    generator = torch.Generator().manual_seed(1)

    async def load(version):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * float(parameter.std()) * noise)
        models[str(version)] = copy.deepcopy(model)
        snapshot = pool.take(version)
        staging.flat.copy_(snapshot.flat)
        snapshot.release()
        await loader.load(staging.tensors, policy_version=version, timeout_s=30)

    deviations = {}
    before = await Reply(server, max_tokens=NUM_TOKENS).run()
    deviations["loaded from the folder"] = deviation(models, before)
    await load(1)
    after = await Reply(server, max_tokens=NUM_TOKENS).run()
    assert set(after.versions) == {"1"}
    deviations["published"] = deviation(models, after)
    assert deviation({"1": models["unverified"]}, after) > 100 * TOLERANCE
    running = Reply(server, max_tokens=2000)
    task = asyncio.create_task(running.run())
    await running.begun()
    await load(2)
    await Reply(server, max_tokens=10).run()
    await running.stop()
    await task
    assert set(running.versions) == {"1", "2"}
    deviations["published while generating"] = deviation(models, running)
    await control.close()
    return deviations


@pytest.mark.sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_tied", "mixtral", "gemma3"])
def test_published_weights_give_the_logprobs_of_the_model(
    family, sglang_python, tmp_path, record_property
):
    # Enough for any of its kernels; the vocabulary is that of the tokenizer.
    model = family_model(family, hidden_size=64, head_dim=16, moe_intermediate_size=32)
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = ServerSettings(
        python=sglang_python,
        model_path=tmp_path / "model",
        log_path=tmp_path / "server.log",
        device="cpu",
        dtype="float32",
        context_length=2048,
        max_running_requests=8,
        max_total_tokens=8192,
        start_timeout_s=START_TIMEOUT_S,
    )

    async def scenario():
        engine = EngineProcess(settings)
        server = await engine.start()
        try:
            return await loads_versions(server, model)
        finally:
            await engine.stop(timeout_s=1.0)

    for name, value in asyncio.run(scenario()).items():
        record_property(name, value)
        print(f"{family}, {name}: {value:.1e}")
        assert value < TOLERANCE, name
