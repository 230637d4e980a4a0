"""An embedded engine that runs, and prompts for it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from transformers import Qwen3ForCausalLM

from skyrl_async.rollout.embedded_engine import EmbeddedEngine


@contextlib.asynccontextmanager
async def running(model: Qwen3ForCausalLM, **options: Any) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(model, **options)
    runner = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


def random_ids(rng: random.Random, count: int, *, vocab_size: int) -> list[int]:
    return rng.choices(range(vocab_size), k=count)
