"""Published ratios of asynchronous over synchronous training, and what the planner says.

Neither lengths nor costs of those systems are published in full, so figures are assumed; only the
size of the ratios compares. Part of ``benchmarks/planner.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from skyrl_async.plan.episodes import DrawnEpisodes
from skyrl_async.plan.scenario import Costs, Scenario
from skyrl_async.plan.search import Hardware, search_splits, simulate_colocated
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.simulate.virtual_engine import EngineTimes


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published ratio of asynchronous over synchronous, and a guess at its figures.

    Attributes:
        name: of the system and its cluster.
        ratio: what was published; baselines and hardware differ, so only its size compares.
        hardware: its GPUs.
        scenario: assumed sizes and costs.
        reply_tokens: assumed lengths.
        max_tokens: of a reply.
    """

    name: str
    ratio: str
    hardware: Hardware
    scenario: Scenario
    reply_tokens: str
    max_tokens: int


def model_costs(*, billions: float, gpus_per_engine: int, publish_s: float) -> Costs:
    """Return assumed costs of a dense model of so many billion parameters on GPUs of 80 GB.

    Decoding reads the weights at 2 TB/s a GPU; an eighth of a step is added for every 25 sequences.
    A trained token costs 8 FLOP a parameter (a forward pass for the proximal logprobs, a forward
    and a backward pass) at 350 TFLOP/s, a prefilled one 2.
    """
    step_s = billions * 2e9 / (2e12 * gpus_per_engine) + 0.005
    return Costs(
        engine=EngineTimes(
            decode_step_s=step_s,
            decode_step_s_per_sequence=step_s / 200,
            prefill_s_per_token=2 * billions * 1e9 / (350e12 * gpus_per_engine),
            swap_stall_s=0.2,
            max_concurrent=256,
            recomputes_kv=False,
        ),
        learner=StepTimes(step_s=2.0, step_s_per_token=8 * billions * 1e9 / 350e12),
        publish_s=publish_s,
    )


PUBLISHED = (
    Published(
        name="verl fully_async, 7B, 28K tokens, 128 GPUs",
        ratio="2.35 to 2.67",
        hardware=Hardware(num_gpus=128, scaling=0.97),
        scenario=Scenario(
            groups_per_step=512,
            group_size=16,
            max_staleness=1,
            prompt_tokens=200,
            costs=model_costs(billions=7, gpus_per_engine=1, publish_s=2),
        ),
        reply_tokens="lognormal:6000,1.0",
        max_tokens=28_000,
    ),
    Published(
        name="AReaL, 32B, 27K tokens, 512 GPUs",
        ratio="up to 2.77",
        hardware=Hardware(num_gpus=512, gpus_per_engine=4, gpus_per_rank=32, scaling=0.97),
        scenario=Scenario(
            groups_per_step=512,
            group_size=16,
            max_staleness=4,
            prompt_tokens=200,
            costs=model_costs(billions=32, gpus_per_engine=4, publish_s=5),
        ),
        reply_tokens="lognormal:6000,1.0",
        max_tokens=27_000,
    ),
    Published(
        name="Laminar, 32B, 32K tokens, 1,024 GPUs",
        ratio="up to 5.48",
        hardware=Hardware(num_gpus=1024, gpus_per_engine=4, gpus_per_rank=64, scaling=0.97),
        scenario=Scenario(
            groups_per_step=512,
            group_size=16,
            max_staleness=8,
            prompt_tokens=200,
            costs=model_costs(billions=32, gpus_per_engine=4, publish_s=5),
        ),
        reply_tokens="lognormal:6000,1.0",
        max_tokens=32_000,
    ),
)


def compare_published(one: Published) -> dict[str, Any]:
    """Return the best split over synchronous training on all GPUs in turn, as planned."""

    def episodes() -> DrawnEpisodes:
        return DrawnEpisodes(reply_tokens=one.reply_tokens, max_tokens=one.max_tokens)

    started = time.perf_counter()
    scenario = replace(one.scenario, steps=16, warmup_steps=8)
    synchronous = simulate_colocated(scenario, episodes, hardware=one.hardware)
    best, *others = search_splits(scenario, episodes, hardware=one.hardware)
    rate = synchronous.forecast.trained_tokens_per_s
    return {
        "name": one.name,
        "published": one.ratio,
        "planned": best.forecast.trained_tokens_per_s / rate,
        "engines": best.num_engines,
        "learner_gpus": best.learner_gpus,
        "max_staleness": one.scenario.max_staleness,
        "staleness_mean": best.forecast.staleness_mean,
        "splits_tried": 1 + len(others),
        "synchronous_tokens_per_s": rate,
        "tokens_per_s": best.forecast.trained_tokens_per_s,
        "seconds": time.perf_counter() - started,
    }
