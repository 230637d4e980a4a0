"""The control endpoints of one SGLang server, which need its admin key.

Only the worker beside the server has that key. All bodies are JSON; nothing here touches tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import aiohttp

PauseMode = Literal["retract", "in_place"]

_KEEPALIVE_S = 2.0
"""The server closes idle connections after 5 s; one that it is closing must not be used again."""


class ControlError(RuntimeError):
    """The server refused a control call, or did not answer in time.

    Attributes:
        status: of the HTTP reply; None if there was none.
    """

    def __init__(self, message: str, *, status: int | None) -> None:
        super().__init__(message)
        self.status = status


class SglangControl:
    """One weight update is ``pause, begin, update…, end, resume``; see ``sglang_loader``.

    Adapters are loaded without a pause; see ``sglang_adapters``.

    Args:
        url: ``http://HOST:PORT`` of the server.
        admin_key: of the server; None for one that was started without keys.
    """

    def __init__(self, *, url: str, admin_key: str | None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def pause(self, mode: PauseMode, *, timeout_s: float) -> None:
        """Stop generating; running requests are kept, with (``in_place``) or without their KV."""
        await self._post("pause_generation", {"mode": mode}, timeout_s)

    async def resume(self, *, timeout_s: float) -> None:
        """Go on generating."""
        await self._post("continue_generation", {"torch_empty_cache": False}, timeout_s)

    async def begin(self, *, timeout_s: float) -> None:
        """Open an update from tensors or over a group."""
        await self._post("begin_weight_update", {}, timeout_s)

    async def end(self, *, timeout_s: float) -> None:
        """Close it; only then are the new weights complete."""
        await self._post("end_weight_update", {}, timeout_s)

    async def update_from_tensors(
        self, payloads: Sequence[str], *, policy_version: int, flush_cache: bool, timeout_s: float
    ) -> None:
        """Load tensors that the server finds in shared memory.

        Args:
            payloads: base64 of the pickled ``[(name, tensor)]``, one per tensor-parallel rank.
            policy_version: reported for every token sampled from now on.
            flush_cache: forget all cached KV; no request may be running with its KV.
            timeout_s: for the whole load.
        """
        body = {
            "serialized_named_tensors": list(payloads),
            "flush_cache": flush_cache,
            "weight_version": str(policy_version),
        }
        await self._post("update_weights_from_tensor", body, timeout_s)

    async def update_from_disk(
        self, folder: str, *, policy_version: int, flush_cache: bool, timeout_s: float
    ) -> None:
        """Load the safetensors files of ``folder``; see :meth:`update_from_tensors`."""
        body = {
            "model_path": folder,
            "flush_cache": flush_cache,
            "weight_version": str(policy_version),
        }
        await self._post("update_weights_from_disk", body, timeout_s)

    async def join_group(
        self, name: str, *, host: str, port: int, backend: str, timeout_s: float
    ) -> None:
        """Meet the learner, rank 0, in a group of two; returns when both have joined."""
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": name,
            "backend": backend,
        }
        await self._post("init_weights_update_group", body, timeout_s)

    async def leave_group(self, name: str, *, timeout_s: float) -> None:
        """Give up a group."""
        await self._post("destroy_weights_update_group", {"group_name": name}, timeout_s)

    async def update_from_group(
        self,
        name: str,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        policy_version: int | None,
        flush_cache: bool,
        timeout_s: float,
    ) -> None:
        """Receive one bucket of tensors, flattened into one broadcast, while the learner sends it.

        Args:
            name: of the group.
            names: of the tensors in the bucket.
            dtypes: of them.
            shapes: of them.
            policy_version: given with the last bucket, None with the others.
            flush_cache: as for :meth:`update_from_tensors`.
            timeout_s: for this bucket.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": name,
            "flush_cache": flush_cache,
            "load_format": "flattened_bucket",
        }
        if policy_version is not None:
            body["weight_version"] = str(policy_version)
        await self._post("update_weights_from_distributed", body, timeout_s)

    async def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> tuple[str, ...]:
        """Load a low-rank adapter beside the weights; the server goes on generating.

        Args:
            name: for requests to name it by; not in use yet.
            folder: in the format of the `peft` library; not needed any more afterwards.
            timeout_s: for the whole load.

        Returns:
            The names of all adapters that are loaded now.
        """
        body = {"lora_name": name, "lora_path": folder}
        text = await self._post("load_lora_adapter", body, timeout_s)
        return _loaded_adapters(text, "load_lora_adapter")

    async def unload_adapter(self, name: str, *, timeout_s: float) -> tuple[str, ...]:
        """Unload an adapter, which no request can name from now on; see :meth:`load_adapter`.

        The server answers, and takes the next such call, when no running request needs it.
        """
        text = await self._post("unload_lora_adapter", {"lora_name": name}, timeout_s)
        return _loaded_adapters(text, "unload_lora_adapter")

    async def abort_all(self, *, timeout_s: float) -> None:
        """End all requests where they are; their callers get the tokens sampled so far."""
        await self._post("abort_request", {"rid": "", "abort_all": True}, timeout_s)

    async def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> str:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(keepalive_timeout=_KEEPALIVE_S),
            )
        limit = aiohttp.ClientTimeout(total=max(0.001, timeout_s))
        try:
            async with self._session.post(
                f"{self._url}/{path}", json=body, timeout=limit
            ) as response:
                text, status = await response.text(), response.status
        except TimeoutError:
            raise ControlError(
                f"{path}: no answer from {self._url} within {timeout_s:.1f} s", status=None
            ) from None
        except aiohttp.ClientError as error:
            raise ControlError(f"{path}: {self._url} {error!r}", status=None) from None
        if status == 200:
            return text
        raise ControlError(f"{path}: {self._url} answered {status}: {text[:500]}", status=status)


def _loaded_adapters(text: str, path: str) -> tuple[str, ...]:
    """Return the names in an answer about adapters.

    Raises:
        ControlError: if it is another one.
    """
    try:
        return tuple(json.loads(text)["loaded_adapters"])
    except (KeyError, TypeError, ValueError):
        raise ControlError(
            f"{path}: the answer names no loaded_adapters: {text[:500]}", status=200
        ) from None
