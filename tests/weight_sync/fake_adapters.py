"""The adapter endpoints of a server, which refuse what the real one refuses.

As in the real one, loads and unloads take turns, and an unload waits until no request needs the
adapter. What goes wrong is scripted: ``faults`` maps an endpoint to what its next calls do.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from tests.weight_sync.fake_server import PostSite, has_admin_key, next_fault

Fault = Literal["refuse", "hang", "forget"]
"""``hang`` never answers; ``forget`` answers that all went well, and loads nothing."""


class FakeAdapterServer:
    """A server that was started for adapters of a rank::

        async with FakeAdapterServer(rank=4) as server:
            control = SglangControl(url=server.url, admin_key=ADMIN_KEY)

    Attributes:
        calls: endpoint and adapter of every call, in order.
        loaded: tensors of the adapters that requests can name.
        configs: what the folders said of them.
        needed: adapters that running requests have named.
        faults: what the next calls of an endpoint do.
    """

    def __init__(self, *, rank: int) -> None:
        self._rank = rank
        self.calls: list[str] = []
        self.loaded: dict[str, dict[str, Tensor]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.needed: set[str] = set()
        self.faults: dict[str, deque[Fault]] = {}
        self._changed = asyncio.Condition()
        self._updating = asyncio.Lock()
        self._release = asyncio.Event()

    async def __aenter__(self) -> FakeAdapterServer:
        self._site = await PostSite.open(self._answer)
        self.url = self._site.url
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._release.set()
        await self._site.close()

    async def _answer(self, request: web.Request) -> web.Response:
        assert has_admin_key(request)
        path, body = request.match_info["path"], await request.json()
        self.calls.append(" ".join(filter(None, (path.split("_")[0], body.get("lora_name")))))
        fault = next_fault(self.faults, path.split("_")[0])
        if fault == "hang":
            await self._release.wait()
        if fault == "refuse":
            return self._result("no, for a reason of its own")
        if fault == "forget":
            return self._result(None)
        handler: Any = getattr(self, f"_{path}")
        response: web.Response = await handler(body)
        return response

    def _result(self, problem: str | None) -> web.Response:
        paths = dict.fromkeys(self.loaded, "/a/folder")
        answer = {"success": not problem, "error_message": problem or "", "loaded_adapters": paths}
        return web.json_response(answer, status=400 if problem else 200)

    async def _load_lora_adapter(self, body: dict[str, Any]) -> web.Response:
        async with self._updating:
            name, folder = body["lora_name"], Path(body["lora_path"])
            assert set(body) == {"lora_name", "lora_path"}
            if name in self.loaded:
                return self._result(f"Failed to load LoRA adapter {name}: it is already loaded")
            config = json.loads((folder / "adapter_config.json").read_text())
            if config["r"] > self._rank:
                return self._result(f"LoRA adapter {name} with rank {config['r']} is incompatible")
            assert config["peft_type"] == "LORA" and config["lora_alpha"] > 0
            tensors = load_file(folder / "adapter_model.safetensors")
            self.loaded[name] = {key: tensor.clone() for key, tensor in tensors.items()}
            self.configs[name] = config
            return self._result(None)

    async def _unload_lora_adapter(self, body: dict[str, Any]) -> web.Response:
        async with self._updating:
            name = body["lora_name"]
            if name not in self.loaded:
                return self._result(f"LoRA with name {name} does not exist")
            del self.loaded[name]
            async with self._changed:
                await self._changed.wait_for(lambda: name not in self.needed)
            return self._result(None)

    async def _abort_request(self, body: dict[str, Any]) -> web.Response:
        assert body == {"rid": "", "abort_all": True}
        async with self._changed:
            self.needed.clear()
            self._changed.notify_all()
        return web.Response()
