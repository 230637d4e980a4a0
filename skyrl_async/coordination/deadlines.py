"""Deadlines whose errors say what was waited for."""

from __future__ import annotations

import asyncio
from typing import Any


class Deadline:
    """``asyncio.timeout`` with a message.

    Args:
        timeout_s: from now.
        what: completes the sentence "waited N s for ...".
    """

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._message = f"waited {timeout_s:g} s for {what}"

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise TimeoutError(self._message) from None
