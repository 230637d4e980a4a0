"""Models and reference computations for the tests of the embedded engine."""

import asyncio
import contextlib
import copy
import random
from collections.abc import AsyncIterator, Sequence

import torch

from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.types import Generation, Sampling

TOLERANCE = 1e-4
DEADLINE_S = 30.0


def roughened(model, *, seed):
    """Give ``model`` weights that are large enough for every context token to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def rough_model(*, seed: int = 0):
    return roughened(build_tiny_model(hidden_size=32, num_layers=2, num_heads=4), seed=seed)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def versions_of(model, *, count: int) -> list:
    """Return ``count`` models: a copy of ``model``, then ones that differ from it more and more."""
    models = [copy.deepcopy(model)]
    for seed in range(1, count):
        other = copy.deepcopy(models[-1])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        models.append(other)
    return models


@torch.no_grad()
def reference_logprobs(model, context: Sequence[int], *, temperature: float) -> torch.Tensor:
    """Return ``[T, V]``: logprobs of the token after each position, by a plain forward pass."""
    logits = model(input_ids=torch.tensor([list(context)])).logits[0].float()
    return torch.log_softmax(logits / temperature, dim=-1)


def deviation(models: Sequence, prompt: Sequence[int], generation: Generation) -> float:
    """Return the largest difference to plain forward passes of each token's own version."""
    reply = generation.token_ids.tolist()
    context = [*prompt, *reply]
    largest = 0.0
    for version in set(generation.policy_versions.tolist()):
        expected = reference_logprobs(models[version], context, temperature=generation.temperature)
        for i, token in enumerate(reply):
            if generation.policy_versions[i] == version:
                difference = expected[len(prompt) + i - 1, token] - float(generation.logprobs[i])
                largest = max(largest, abs(float(difference)))
    return largest


@contextlib.asynccontextmanager
async def running(model, **options) -> AsyncIterator[EmbeddedEngine]:
    """Run an engine around ``model`` for at most the deadline."""
    defaults = {"max_concurrent": 8, "context_length": 64}
    engine = EmbeddedEngine(model, **(defaults | options))
    runner = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


async def decode_steps(engine: EmbeddedEngine, count: int) -> None:
    """Return at the token boundary after ``count`` more decode steps."""
    done = 0
    for _ in range(1000):
        done += engine.take_stats().decode_steps
        if done >= count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"only {done} of {count} decode steps happened")


async def play_while_swapping(engine, models, *, sessions, steps_between=4, vocab_size=64):
    """Play multi-turn sessions while every version is loaded; return (prompt, generation)s."""

    async def play(index):
        rng, played = random.Random(index), []
        context = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))]
        for turn in range(5):
            generation = await engine.generate(
                context,
                Sampling(max_tokens=rng.randint(1, 9), temperature=rng.choice([0.7, 1.0])),
                request_id=f"{index}/{turn}",
                session_id=str(index),
            )
            played.append((context, generation))
            observation = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 5))]
            context = context + generation.token_ids.tolist() + observation
        return played

    tasks = [asyncio.create_task(play(i)) for i in range(sessions)]
    for version in range(1, len(models)):
        await decode_steps(engine, steps_between)
        await engine.load_weights(weights_of(models[version]), policy_version=version)
    return [pair for played in await asyncio.gather(*tasks) for pair in played]
