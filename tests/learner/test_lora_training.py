"""An adapter trained by the learner, published both ways to the embedded engine."""

import asyncio
import copy

import pytest
import torch

from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.lora import (
    LoraSettings,
    adapter_parameters,
    add_adapter,
    fill_adapter,
    merged_parameters,
)
from skyrl_async.learner.lora_merge import AdapterMerger
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import Sampling
from skyrl_async.weight_sync.snapshot import SnapshotPool
from tests.models.families import family_model
from tests.records import random_batch
from tests.rollout.embedded_engine_cases import TOLERANCE, deviation, running

LORA = LoraSettings(rank=4, alpha=16)
STEPS = 4


def lora_learner(model, **algorithm):
    add_adapter(model, LORA)
    fill_adapter(model.named_parameters(), seed=0)
    settings = LearnerSettings(
        algorithm=AlgorithmSettings(**algorithm), optimizer=OptimizerSettings(learning_rate=1e-2)
    )
    return Learner(model, settings)


@pytest.mark.parametrize("publish", ["merged", "adapter"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_the_engine_samples_from_the_policy_that_was_trained(family, publish):
    base = family_model(family)
    learner = lora_learner(copy.deepcopy(base))
    sources = merged_parameters if publish == "merged" else adapter_parameters
    pool = SnapshotPool(sources(learner.model))
    engine_model = copy.deepcopy(base)
    merger = AdapterMerger(engine_model, scale=LORA.scale) if publish == "adapter" else None

    async def scenario():
        policies, replies = [base], []
        async with running(engine_model) as engine:
            for step in range(STEPS):
                result = learner.step(random_batch(step, train_version=step))
                assert not result.skipped
                policies.append(copy.deepcopy(learner.model))
                snapshot = pool.take(step + 1)
                weights = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
                snapshot.release()
                if merger is not None:
                    weights = merger.merge(weights)
                await engine.load_weights(weights, policy_version=step + 1)
                prompts = [[3, step, i] for i in range(4)]
                calls = [
                    engine.generate(p, Sampling(max_tokens=20), request_id=str(p)) for p in prompts
                ]
                replies += zip(prompts, await asyncio.gather(*calls), strict=True)
        return policies, replies

    policies, replies = asyncio.run(scenario())
    assert max(deviation(policies, *pair) for pair in replies) <= TOLERANCE
    assert deviation([base] * (STEPS + 1), *replies[-1]) > 100 * TOLERANCE
    sizes = {name: p.numel() for name, p in base.named_parameters()}
    if publish == "adapter":
        assert pool.layout.size_bytes < 4 * sum(sizes.values())


def test_training_changes_the_adapter_alone():
    learner = lora_learner(build_tiny_model(hidden_size=16, num_heads=2))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    for step in range(2):
        learner.step(random_batch(step, train_version=step))
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    held = learner.trainer.optimizer.state_dict()["state"]
    assert len(held) == len(list(adapter_parameters(learner.model)))


def test_a_kl_penalty_holds_on_to_the_model_without_its_adapter():
    model = build_tiny_model(hidden_size=16, num_heads=2)
    learner = lora_learner(model, kl=KlSettings(coefficient=0.5))
    # Nothing differs from the reference when the first step begins, something does in the next.
    first, second = (
        learner.step(random_batch(step, train_version=step)).metrics["loss/kl"] for step in (0, 1)
    )
    assert second > first >= 0
