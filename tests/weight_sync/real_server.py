"""What the tests of weight loads do with a real server: generate, change the weights, compare."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import torch
from torch import Tensor

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.engine_process import RunningServer
from skyrl_async.rollout.sglang_protocol import new_rid
from skyrl_async.weight_sync.layout import FlatBuffer, WeightLayout
from skyrl_async.weight_sync.pair import host_store
from skyrl_async.weight_sync.sglang_control import SglangControl
from skyrl_async.weight_sync.sglang_direct import DirectReceiver, DirectSender
from skyrl_async.weight_sync.sglang_loader import SglangLoader
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.weight_sync.peers import in_thread, soon

CONTEXT = [5, 6, 7, 8, 9, 10, 11, 12]
TOLERANCE = 1e-4
LONG_REPLY = 4000
"""Tokens, more than a server makes in three updates; its context is 4,096."""


class Reply:
    """One generation: tokens, logprobs and versions once it has ended, its length before."""

    def __init__(self, server: RunningServer, *, max_tokens: int, extra_key: str = "") -> None:
        self._server = server
        self._headers = {"Authorization": f"Bearer {server.api_key}"}
        self._body = {
            "rid": new_rid(),
            "input_ids": CONTEXT,
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream_interval": 10,
            },
            "return_logprob": True,
            "stream": True,
            "extra_key": extra_key or None,
        }
        self._grown = asyncio.Condition()
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[str] = []

    async def run(self) -> Reply:
        """Generate."""
        meta: Mapping[str, Any] = {}
        async with (
            aiohttp.ClientSession(headers=self._headers, read_bufsize=1 << 20) as session,
            session.post(f"{self._server.url}/generate", json=self._body) as response,
        ):
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line.removeprefix(b"data: "))
                    meta = chunk["meta_info"]
                    async with self._grown:
                        self._add(chunk["output_ids"], meta)
                        self._grown.notify_all()
        for span in meta["weight_versions"]:
            assert span["start"] == len(self.versions), "tokens without a version"
            self.versions += [span["version"]] * (span["end"] - span["start"])
        assert len(self.token_ids) == len(self.versions)
        return self

    def _add(self, token_ids: list[int], meta: Mapping[str, Any]) -> None:
        """Take the end of what is there and came: some servers repeat earlier tokens, some not."""
        total = meta["completion_tokens"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        self.token_ids = (self.token_ids + token_ids)[-total:]
        self.logprobs = (self.logprobs + logprobs)[-total:]
        assert len(self.token_ids) == len(self.logprobs) == total

    async def begun(self) -> None:
        """Wait until tokens are there."""
        async with asyncio.timeout(60), self._grown:
            await self._grown.wait_for(lambda: self.token_ids)

    async def stop(self) -> None:
        """Let the server end the generation where it is."""
        headers = {"Authorization": f"Bearer {self._server.admin_key}"}
        body = {"rid": self._body["rid"]}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{self._server.url}/abort_request", json=body) as response,
        ):
            assert response.status == 200, await response.text()


class Policy:
    """The weights of a learner, and a copy of every version.

    Attributes:
        model: changed in place.
        by_label: models by version as the server reports it.
    """

    def __init__(self) -> None:
        self.model = build_tiny_model().requires_grad_(False)
        self.by_label = {"unverified": copy.deepcopy(self.model)}

    def change(self, policy_version: int) -> None:
        """Make a version that differs clearly from the one before."""
        generator = torch.Generator().manual_seed(policy_version)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * float(parameter.std()) * noise)
        self.by_label[str(policy_version)] = copy.deepcopy(self.model)

    def deviations(self, reply: Reply) -> Tensor:
        """Return by how much each token's logprob is off a plain pass of its own version."""
        plain = {
            label: _plain_logprobs(self.by_label[label], reply.token_ids)
            for label in set(reply.versions)
        }
        expected = [float(plain[label][i]) for i, label in enumerate(reply.versions)]
        return (torch.tensor(expected) - torch.tensor(reply.logprobs)).abs()


def _plain_logprobs(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([[*CONTEXT, *token_ids]])).logits[0, len(CONTEXT) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


Update = Callable[[int], Awaitable[None]]


@contextlib.asynccontextmanager
async def updating(
    server: RunningServer, policy: Policy, *, way: str, kv: Any
) -> AsyncIterator[Update]:
    """Yield ``update(policy_version)``, which changes the policy and loads it in one way."""
    control = SglangControl(url=server.url, admin_key=server.admin_key)
    loader = SglangLoader(control, kv_after_swap=kv, way="file" if way == "file" else "memory")
    named = list(policy.model.named_parameters())
    layout = WeightLayout.of(named)
    buffer = FlatBuffer(layout, shared=True)
    pool = SnapshotPool(named, num_buffers=1)
    sender = DirectSender("engine", store=host_store(), bucket_bytes=1 << 16)
    receiver = DirectReceiver(sender.address, expected=layout)

    async def staged(policy_version: int) -> None:
        policy.change(policy_version)
        for name, tensor in named:
            buffer.tensors[name].copy_(tensor)
        report = await loader.load(buffer.tensors, policy_version=policy_version, timeout_s=20)
        assert report.policy_version == policy_version

    async def direct(policy_version: int) -> None:
        policy.change(policy_version)
        snapshot = pool.take(policy_version)
        sent = in_thread(lambda: sender.send(snapshot, deadline=soon(20)))
        version = await asyncio.to_thread(receiver.receive, 10.0)
        assert version is not None
        report = await receiver.pull(control, loader)
        assert report.policy_version == policy_version
        receiver.acknowledge(version, None)
        outcome, _ = await asyncio.to_thread(sent)
        assert outcome.size_bytes == layout.size_bytes, outcome
        snapshot.release()

    try:
        yield direct if way == "direct" else staged
    finally:
        sender.close()
        receiver.close()
        await control.close()


async def put_back(server: RunningServer, folder: Path) -> None:
    """Give the server its own weights again, and their label."""
    control = SglangControl(url=server.url, admin_key=server.admin_key)
    await control.pause("retract", timeout_s=20)
    await control.update_from_disk(str(folder), policy_version=0, flush_cache=True, timeout_s=20)
    await control.resume(timeout_s=20)
    await control.close()
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    body = {"new_version": "unverified", "abort_all_requests": False}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{server.url}/update_weight_version", json=body) as response,
    ):
        assert response.status == 200


@contextlib.contextmanager
def restored(server: RunningServer, folder: Path) -> Iterator[None]:
    """Leave the server as it was, whatever happens inside."""
    try:
        yield
    finally:
        asyncio.run(put_back(server, folder))


def spans_updates(
    server: RunningServer,
    folder: Path,
    way: str,
    kv: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Check a generation that runs through three updates, and requests after them."""

    async def scenario() -> None:
        policy = Policy()
        async with updating(server, policy, way=way, kv=kv) as update:
            reply = Reply(server, max_tokens=LONG_REPLY, extra_key="unverified")
            running = asyncio.create_task(reply.run())
            await reply.begun()
            for version in (1, 2, 3):
                await update(version)
                # Both are in one batch, so the long one has as many tokens of this version.
                short = Reply(server, max_tokens=40, extra_key=f"beside {version}")
                assert set((await short.run()).versions) == {str(version)}
            await reply.stop()
            await running
        spans = [(version, len(list(run))) for version, run in itertools.groupby(reply.versions)]
        assert [version for version, _ in spans] == ["unverified", "1", "2", "3"], spans
        deviations = policy.deviations(reply)
        record_property(f"deviation_nats_{way}_{kv}", float(deviations.max()))
        print(f"{way}, {kv}: largest {deviations.max():.2e}, mean {deviations.mean():.2e} nats")
        before = reply.versions.index("1")
        assert deviations[:before].max() < TOLERANCE
        if kv == "recompute":
            assert deviations.max() < TOLERANCE
        # It has a cache namespace of its own, as nothing else keeps it off KV of old weights.
        later = await Reply(server, max_tokens=100, extra_key="3").run()
        assert set(later.versions) == {"3"}
        assert policy.deviations(later).max() < TOLERANCE

    with restored(server, folder):
        asyncio.run(scenario())
