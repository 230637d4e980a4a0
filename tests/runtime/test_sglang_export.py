"""A real SGLang server starts from the policy that is exported from a checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from skyrl_async.rollout.engine_process import EngineProcess, ServerSettings
from skyrl_async.runtime.export import export_policy
from tests.models.test_sglang_families import deviation
from tests.runtime.launch import run_here
from tests.sglang_server import START_TIMEOUT_S
from tests.weight_sync.real_server import TOLERANCE, Reply

pytest_plugins = ("tests.sglang_server",)

TRAINED = (
    *("run.steps=3", "checkpoint.every_steps=1", "optimizer.learning_rate=0.01"),
    *("model.hidden_size=64", "model.num_heads=4", "engine.context_length=2048"),
    "evaluation.num_tasks=2",
)


@pytest.mark.sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("adapters", [(), ("lora.rank=4",)], ids=["all_weights", "adapters"])
def test_the_server_gives_the_logprobs_of_the_checkpoint(adapters, sglang_python, tmp_path: Path):
    run_here(tmp_path / "run", *TRAINED, *adapters)
    export_policy(tmp_path / "run", tmp_path / "exported")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").eval()

    async def scenario() -> Reply:
        engine = EngineProcess(
            ServerSettings(
                python=sglang_python,
                model_path=tmp_path / "exported",
                log_path=tmp_path / "server.log",
                device="cpu",
                dtype="float32",
                context_length=2048,
                max_running_requests=8,
                max_total_tokens=8192,
                start_timeout_s=START_TIMEOUT_S,
            )
        )
        server = await engine.start()
        try:
            return await Reply(server, max_tokens=40).run()
        finally:
            await engine.stop(timeout_s=1.0)

    reply = asyncio.run(scenario())
    assert len(reply.token_ids) > 0
    assert deviation(dict.fromkeys(reply.versions, trained), reply) < TOLERANCE
