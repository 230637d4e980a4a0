"""Demonstrations for tests: an optimal player of the guessing game."""

from __future__ import annotations

import json
from pathlib import Path

from skyrl_async.environments.number_guess import NumberGuess


def binary_search(seed: int) -> list[dict[str, str]]:
    """Play one game by halving what is left; return the conversation."""
    environment = NumberGuess()
    observation, _ = environment.reset(seed=seed)
    messages = [{"role": "user", "content": observation}]
    low, high = 1, 10
    while True:
        guess = (low + high) // 2
        messages.append({"role": "assistant", "content": str(guess)})
        answer, reward, terminated, _, _ = environment.step(str(guess))
        if terminated:
            assert reward == 1.0
            return messages
        messages.append({"role": "user", "content": answer})
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)


def write_games(path: Path, count: int) -> Path:
    rows = (json.dumps({"messages": binary_search(seed)}) for seed in range(count))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
