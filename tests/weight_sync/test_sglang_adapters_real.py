"""Adapters in a real server: what it samples with them, and what stays loaded."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import aiohttp
import pytest
import torch
from torch import Tensor

from skyrl_async.learner.lora import (
    LoraSettings,
    adapter_parameters,
    add_adapter,
    fill_adapter,
    merged_parameters,
)
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.endpoint import EngineEndpoint
from skyrl_async.rollout.engine_launch import (
    MIN_ADAPTER_VERSION,
    EngineStartError,
    ServedAdapters,
    check_version,
    is_recent,
)
from skyrl_async.rollout.engine_pool import EnginePool
from skyrl_async.rollout.engine_process import EngineProcess
from skyrl_async.rollout.sglang_protocol import adapter_name, adapter_version
from skyrl_async.rollout.sglang_server_info import adapter_problem
from skyrl_async.types import Sampling
from skyrl_async.weight_sync.sglang_adapters import AdapterLoader, AdapterSettings
from skyrl_async.weight_sync.sglang_control import ControlError, SglangControl
from tests.sglang_server import START_TIMEOUT_S, LoopThread

pytest_plugins = ("tests.sglang_server",)
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(300)]

CONTEXT = [5, 6, 7, 8, 9, 10, 11, 12]
TOLERANCE = 1e-4
RANK, ALPHA = 4, 8.0
LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
SERVED = ServedAdapters(rank=RANK, target_modules=LAYERS, num_slots=6)


class AdaptedPolicy:
    """A model with adapters, and the plain merged model of every version."""

    def __init__(self, *, rank: int = RANK) -> None:
        settings = LoraSettings(rank=rank, alpha=ALPHA, target_modules=LAYERS)
        self.model = add_adapter(build_tiny_model(), settings)
        fill_adapter(self.model.named_parameters(), seed=0)
        self.merged = {}

    def change(self, version: int) -> dict[str, Tensor]:
        """Make a version that differs clearly from the one before; version 0 changes nothing."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for _, side in adapter_parameters(self.model) if version else ():
                side.copy_(0.2 * torch.randn(side.shape, generator=generator))
        plain = build_tiny_model().eval()
        whole = {
            n: w if isinstance(w, Tensor) else w.tensor() for n, w in merged_parameters(self.model)
        }
        plain.load_state_dict(whole, strict=False)
        self.merged[version] = plain
        return {name: side.detach().clone() for name, side in adapter_parameters(self.model)}

    def deviation(self, generation, context=CONTEXT) -> float:
        """Return how far a logprob is off a plain pass of its own version, at most."""
        token_ids = torch.tensor(generation.token_ids).long()
        worst = 0.0
        for version in set(generation.policy_versions.tolist()):
            with torch.inference_mode():
                whole = torch.cat([torch.tensor(context), token_ids])[None]
                logits = self.merged[version](whole).logits[0, len(context) - 1 : -1]
            plain = torch.log_softmax(logits, -1).gather(-1, token_ids[:, None])[:, 0]
            own = torch.tensor(generation.policy_versions == version)
            off = (plain - torch.tensor(generation.logprobs)).abs()[own]
            worst = max(worst, float(off.max()))
        return worst


@pytest.fixture(scope="module")
def adapter_server(sglang_settings, tmp_path_factory):
    log_path = tmp_path_factory.mktemp("sglang") / "server.log"
    loop = LoopThread()
    try:
        engine = EngineProcess(sglang_settings(log_path, adapters=SERVED))
        try:
            server = loop.run(engine.start(), timeout_s=START_TIMEOUT_S + 60)
        except EngineStartError as error:
            assert MIN_ADAPTER_VERSION in str(error), error
            pytest.skip(str(error))
        yield server
        loop.run(engine.stop(timeout_s=1.0), timeout_s=60)
    finally:
        loop.close()


class Served:
    """A pool over the server, and a loader beside it."""

    def __init__(self, server, pool, loader) -> None:
        self.server, self.pool, self.loader = server, pool, loader
        self.policy = AdaptedPolicy()

    async def publish(self, version: int) -> None:
        """Do what a run does with a version."""
        adapter = self.policy.change(version)
        report = await self.loader.load(adapter, policy_version=version, timeout_s=30)
        assert report.policy_version == version
        self.tell(version)

    def tell(self, version: int) -> None:
        endpoint = EngineEndpoint(
            engine_id="e0",
            url=self.server.url,
            api_key=self.server.api_key,
            policy_version=version,
        )
        self.pool.set_engines([endpoint])

    def ask(self, name: str, *, max_tokens: int = 40):
        return asyncio.create_task(
            self.pool.generate(CONTEXT, Sampling(max_tokens=max_tokens), request_id=name)
        )

    async def running(self, at_least: int) -> None:
        """Return when the server decodes so many requests."""
        async with asyncio.timeout(30):
            while (await self._get("v1/loads"))["loads"][0]["num_running_reqs"] < at_least:
                await asyncio.sleep(0.02)

    async def loaded(self) -> set[int]:
        """Return the versions that requests can name."""
        names = [model["id"] for model in (await self._get("v1/models"))["data"]]
        return {v for v in map(adapter_version, names) if v is not None}

    async def info(self):
        return await self._get("server_info")

    async def _get(self, path: str):
        headers = {"Authorization": f"Bearer {self.server.api_key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{self.server.url}/{path}") as response,
        ):
            return await response.json()


@contextlib.asynccontextmanager
async def serving(server, kv):
    """Publish version 0, and yield a :class:`Served`."""
    control = SglangControl(url=server.url, admin_key=server.admin_key)
    loader = AdapterLoader(
        control,
        settings=AdapterSettings(rank=RANK, alpha=ALPHA),
        kv_after_swap=kv,
        name_of=adapter_name,
        is_ours=lambda name: adapter_version(name) is not None,
    )
    pool = EnginePool(
        vocab_size=64, context_length=4096, kv_after_swap=kv, poll_interval_s=0.2, adapters=True
    )
    runner = asyncio.create_task(pool.run())
    served = Served(server, pool, loader)
    try:
        await served.publish(0)
        yield served
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner
        await control.close()


def spans(generation):
    groups = itertools.groupby(generation.policy_versions.tolist())
    return [(version, len(list(run))) for version, run in groups]


def test_a_running_generation_goes_on_with_each_new_adapter(adapter_server):
    async def scenario():
        async with serving(adapter_server, "recompute") as served:
            first = await served.ask("first")
            whole = served.ask("whole", max_tokens=3000)
            shorts = []
            for version in (1, 2, 3):
                await served.running(1)
                await served.publish(version)
                # Both are in one batch, so the long one has tokens of this version as well.
                shorts.append(await served.ask(f"beside {version}"))
            served.pool.abort("whole")
            generation = await whole
            return served.policy, first, shorts, generation, await served.loaded()

    policy, first, shorts, generation, loaded = asyncio.run(scenario())
    assert spans(first) == [(0, 40)]
    assert [spans(short) for short in shorts] == [[(version, 40)] for version in (1, 2, 3)]
    versions = [version for version, _ in spans(generation)]
    assert versions == [0, 1, 2, 3], spans(generation)
    for one in (first, *shorts, generation):
        assert policy.deviation(one) < TOLERANCE
    # The adapters are far enough apart for a wrong version to show.
    policy.merged[1] = policy.merged[2]
    assert policy.deviation(shorts[0]) > 100 * TOLERANCE
    assert loaded == {2, 3}


def test_kept_requests_end_with_the_adapter_that_they_began_with(adapter_server):
    async def scenario():
        async with serving(adapter_server, "keep") as served:
            long = served.ask("long", max_tokens=1000)
            await served.running(1)
            for version in (1, 2, 3):
                await served.publish(version)
            short = await served.ask("short")
            assert not long.done(), "both were in one batch"
            still_loaded = await served.loaded()
            return served.policy, await long, short, still_loaded

    policy, long, short, loaded = asyncio.run(scenario())
    assert spans(long) == [(0, 1000)] and spans(short) == [(3, 40)]
    assert policy.deviation(long) < TOLERANCE and policy.deviation(short) < TOLERANCE
    assert loaded == {0, 1, 2, 3}


def test_a_request_too_old_to_keep_goes_on_with_the_newest_adapter(adapter_server):
    async def scenario():
        async with serving(adapter_server, "keep") as served:
            long = served.ask("long", max_tokens=3500)
            await served.running(1)
            for version in (1, 2, 3, 4):
                await served.publish(version)
            loaded = await served.loaded()
            await served.ask("beside")
            served.pool.abort("long")
            return served.policy, await long, loaded

    policy, long, loaded = asyncio.run(scenario())
    assert [version for version, _ in spans(long)] == [0, 4]
    assert policy.deviation(long) < TOLERANCE
    assert loaded == {1, 2, 3, 4}


def test_an_adapter_of_another_rank_is_refused_and_nobody_else_notices(adapter_server):
    async def scenario():
        async with serving(adapter_server, "recompute") as served:
            await served.publish(1)
            beside = served.ask("beside", max_tokens=300)
            await served.running(1)
            larger = AdaptedPolicy(rank=2 * RANK).change(2)
            with pytest.raises(ValueError, match="not that of rank 4"):
                await served.loader.load(larger, policy_version=2, timeout_s=30)
            unchecked = AdapterLoader(
                served.loader._control,
                settings=AdapterSettings(rank=2 * RANK, alpha=ALPHA),
                kv_after_swap="recompute",
                name_of=adapter_name,
                is_ours=lambda name: adapter_version(name) is not None,
            )
            with pytest.raises(ControlError, match="rank 8 is incompatible"):
                await unchecked.load(larger, policy_version=2, timeout_s=30)
            generation = await beside
            return served.policy, generation, await served.loaded(), await served.info()

    policy, generation, loaded, info = asyncio.run(scenario())
    assert spans(generation) == [(1, 300)] and policy.deviation(generation) < TOLERANCE
    assert loaded == {0, 1}
    assert adapter_problem(info, SERVED) is None


def test_an_adapter_of_few_layers_is_what_its_merged_model_is(adapter_server):
    """SGLang computes q, k and v as one layer, and gate and up."""

    async def scenario():
        async with serving(adapter_server, "recompute") as served:
            layers = ("q_proj", "v_proj", "gate_proj", "down_proj")
            settings = LoraSettings(rank=RANK, alpha=ALPHA, target_modules=layers)
            served.policy.model = add_adapter(build_tiny_model(), settings)
            await served.publish(1)
            return served.policy, await served.ask("few")

    policy, generation = asyncio.run(scenario())
    assert spans(generation) == [(1, 40)]
    assert policy.deviation(generation) < TOLERANCE


def test_a_server_that_cannot_unload_reliably_is_not_started(sglang_settings, tmp_path):
    settings = sglang_settings(tmp_path / "server.log", adapters=SERVED)
    try:
        version = asyncio.run(check_version(settings))
    except EngineStartError as error:
        assert "for lora.publish=adapter at least 0.5.23" in str(error)
    else:
        assert is_recent(version, minimum=MIN_ADAPTER_VERSION)
