"""The control endpoints of a server, which demand the order and the keys that the real one needs.

It dies of what the real one dies of, and blocks while a broadcast does not come. What goes wrong is
scripted: ``faults`` maps an endpoint to what happens at its next calls, in order.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from skyrl_async.weight_sync.layout import dtype_of
from tests.weight_sync.fake_server import PostSite, has_admin_key, next_fault
from tests.weight_sync.peers import Parameters

Fault = Literal["refuse", "hang", "late", "none"]
"""``hang`` never answers and blocks what follows; ``late`` acts, but does not answer."""

SHORT_NAMES = {
    "pause_generation": "pause",
    "continue_generation": "resume",
    "begin_weight_update": "begin",
    "end_weight_update": "end",
    "update_weights_from_tensor": "update",
    "update_weights_from_disk": "update",
    "update_weights_from_distributed": "update",
    "init_weights_update_group": "join",
    "destroy_weights_update_group": "leave",
}


class FakeControl:
    """A server that decodes a request all the time::

        async with FakeControl(parameters) as server:
            control = SglangControl(url=server.url, admin_key=ADMIN_KEY)

    Attributes:
        calls: short names of the endpoints that were called with the right key, in order.
        faults: what happens at the next calls of an endpoint, by short name.
        weights: that it runs.
        label: of the weights.
        paused: the mode, while it is paused.
        updating: whether an update is open.
        resumed_in_update: whether it ever went on with incomplete weights.
        flushes: of the cache.
        unauthorized: calls without the admin key.
        hung: set when a call hangs or waits for a broadcast.
        num_payloads: of the last update from tensors.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in parameters}
        self.weights: dict[str, Tensor] = {name: tensor.clone() for name, tensor in parameters}
        self.calls: list[str] = []
        self.faults: dict[str, deque[Fault]] = {}
        self.label = "unverified"
        self.paused: str | None = None
        self.updating = False
        self.resumed_in_update = False
        self.flushes = 0
        self.num_payloads = 0
        self.unauthorized = 0
        self.dead = False
        self.hung = asyncio.Event()
        self._release = asyncio.Event()
        self._scheduler = asyncio.Lock()
        self._groups: dict[str, Any] = {}

    async def __aenter__(self) -> FakeControl:
        self._site = await PostSite.open(self._answer, max_bytes=1 << 26)
        self.url = self._site.url
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._release.set()
        await self._site.close()

    async def called(self, name: str) -> None:
        """Return when an endpoint has been called."""
        async with asyncio.timeout(10):
            while name not in self.calls:
                await asyncio.sleep(0.005)

    async def _answer(self, request: web.Request) -> web.Response:
        if self.dead:
            return self._drop(request)
        if not has_admin_key(request):
            self.unauthorized += 1
            return web.json_response({"error": "Unauthorized"}, status=401)
        path = request.match_info["path"]
        body = await request.json()
        name = SHORT_NAMES[path]
        self.calls.append(name)
        # The scheduler does one thing at a time, so whatever follows a blocked call waits for it.
        async with self._scheduler:
            fault = next_fault(self.faults, name)
            if fault == "hang":
                self.hung.set()
                await self._release.wait()
                return self._drop(request)
            if fault == "refuse":
                return _refusal("no, for a reason of its own")
            problem = await getattr(self, f"_{path}")(body)
        if fault == "late":
            self.hung.set()
            await self._release.wait()
        if self.dead:
            return self._drop(request)
        return _refusal(problem) if problem else web.json_response({"success": True})

    def _drop(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    async def _pause_generation(self, body: Mapping[str, Any]) -> str | None:
        assert body["mode"] in ("retract", "in_place") and self.paused is None
        self.paused = body["mode"]
        return None

    async def _continue_generation(self, body: Mapping[str, Any]) -> str | None:
        self.resumed_in_update |= self.updating
        self.paused = None
        return None

    async def _begin_weight_update(self, body: Mapping[str, Any]) -> str | None:
        assert self.paused is not None, "an update waits for the end of running requests"
        if self.updating:
            return "a weight-update session is already open"
        self.updating = True
        return None

    async def _end_weight_update(self, body: Mapping[str, Any]) -> str | None:
        if not self.updating:
            return "no weight-update session is open"
        self.updating = False
        return None

    async def _update_weights_from_tensor(self, body: Mapping[str, Any]) -> str | None:
        if not self.updating:
            return "must run between begin_weight_update() and end_weight_update()"
        payloads = [base64.b64decode(text) for text in body["serialized_named_tensors"]]
        self.num_payloads = len(payloads)
        return self._load(dict(pickle.loads(payloads[0])), body)

    async def _update_weights_from_disk(self, body: Mapping[str, Any]) -> str | None:
        assert self.paused is not None
        files = list(Path(body["model_path"]).glob("*.safetensors"))
        return self._load({k: v for file in files for k, v in load_file(file).items()}, body)

    async def _init_weights_update_group(self, body: Mapping[str, Any]) -> str | None:
        assert (body["rank_offset"], body["world_size"], body["backend"]) == (1, 2, "gloo")
        self._groups[body["group_name"]] = await asyncio.to_thread(_join, body)
        return None

    async def _destroy_weights_update_group(self, body: Mapping[str, Any]) -> str | None:
        del self._groups[body["group_name"]]
        return None

    async def _update_weights_from_distributed(self, body: Mapping[str, Any]) -> str | None:
        if not self.updating:
            return "must run between begin_weight_update() and end_weight_update()"
        assert body["load_format"] == "flattened_bucket"
        received = {
            name: torch.empty(shape, dtype=dtype_of(dtype))
            for name, dtype, shape in zip(
                body["names"], body["dtypes"], body["shapes"], strict=True
            )
        }
        flat = torch.cat([t.reshape(-1).view(torch.uint8) for t in received.values()])
        self.hung.set()
        try:
            await asyncio.to_thread(_receive, self._groups[body["group_name"]], flat)
        except RuntimeError as error:
            return f"Failed to receive weights: {error}"
        start = 0
        for name, tensor in received.items():
            end = start + tensor.numel() * tensor.element_size()
            received[name] = flat[start:end].clone().view(tensor.dtype).view(tensor.shape)
            start = end
        return self._load(received, body)

    def _load(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> str | None:
        for name, tensor in tensors.items():
            if name not in self._shapes:
                continue  # as the real one: silently
            if tuple(tensor.shape) != self._shapes[name]:
                return f"shape of {name}: weights were partially updated"
            self.weights[name] = tensor.clone()
        if body["flush_cache"]:
            self.flushes += 1
            self.dead = self.paused != "retract"  # AssertionError: Cache flush failed
        self.label = body.get("weight_version") or self.label
        return None


def _refusal(message: str) -> web.Response:
    return web.json_response({"success": False, "message": message}, status=400)


def _join(body: Mapping[str, Any]) -> Any:
    """Return rank 1, without the tables of the process, in which rank 0 may be."""
    store: Any = dist.TCPStore(body["master_address"], body["master_port"], wait_for_workers=False)
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, body["rank_offset"], body["world_size"], options)


def _receive(group: Any, flat: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([flat], options).wait()
