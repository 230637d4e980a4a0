"""What the scripts of other trainers share: the task of single_turn.py, its clock and its result.

Each of them runs under an interpreter that has its trainer, ``torch`` and ``transformers``, and
nothing else of what this repository requires. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PROMPTS, GROUP_SIZE, MAX_TOKENS = 16, 16, 2
_INTEGER = re.compile(r"-?[0-9]+")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that single_turn.py passes to every trainer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--tasks", type=Path, required=True, help='JSON list of {"prompt","answer"}'
    )
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    parser.add_argument("--max-seconds", type=float, default=300, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sampling")
    return parser


def model_and_tokenizer(seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Return the initial model of both sides, and its tokenizer, padding on the left."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.padding_side = "left"
    return build_tiny_model(hidden_size=128, max_position_embeddings=128, seed=seed), tokenizer


def rewards(replies: Sequence[str], answers: Sequence[int]) -> list[float]:
    """Return 1 for every reply whose first integer is the answer, else 0."""
    found = [_INTEGER.search(reply) for reply in replies]
    return [
        float(match is not None and int(match.group()) == right)
        for match, right in zip(found, answers, strict=True)
    ]


class StepClock:
    """Keeps the seconds and the reward of every step."""

    def __init__(self, *, max_seconds: float) -> None:
        self.steps: list[dict[str, float]] = []
        self._max_seconds = max_seconds
        self._started_s = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started_s

    @property
    def over(self) -> bool:
        """Whether the time limit has passed."""
        return self.seconds > self._max_seconds

    def step(self, reward: float) -> None:
        """Take the mean reward over the trajectories of a step that has ended."""
        self.steps.append({"time_s": self.seconds, "reward": reward})


def print_result(
    clock: StepClock,
    args: argparse.Namespace,
    *,
    packages: Sequence[str],
    first_prompt: Sequence[int],
    **more: Any,
) -> None:
    """Print the object that single_turn.py reads; ``first_prompt`` are token IDs."""
    result = {
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "threads": args.threads,
        "first_prompt_token_ids": list(first_prompt),
        "steps": clock.steps,
        **more,
    }
    print(json.dumps(result), flush=True)
