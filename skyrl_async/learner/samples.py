"""A few trajectories of a step with what the loss is given for each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skyrl_async.learner.minibatches import Minibatch
from skyrl_async.types import Float32Array, TrainSequence

MAX_TOKENS = 2048
"""Of one sample; the middle of a longer trajectory is left out."""

_LONGEST_CHARACTER = 4
"""Tokens that one character may be split into: bytes of UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One trained trajectory; arrays are ``[T]`` like those of its sequence.

    Attributes:
        why: it was chosen: ``best``, ``worst``, ``oldest`` or ``random``.
        sequence: as it was packed.
        advantages: that the loss is given, after critic, teacher and whitening; 0 outside the loss.
        in_loss: sampled, young enough, and not rejected by a correction of the whole batch.
    """

    why: str
    sequence: TrainSequence
    advantages: Float32Array
    in_loss: NDArray[np.bool_]

    def record(self, tokenizer: Any, *, train_version: int) -> dict[str, Any]:
        """Return the sample as values of JSON; observations have null for what only replies have.

        Args:
            tokenizer: of the policy, with ``decode``.
            train_version: policy version at the start of the step.
        """
        s, chosen = self.sequence, shown_tokens(len(self.sequence.token_ids))
        sampled = s.policy_versions[chosen] >= 0

        def of_replies(values: NDArray[Any], digits: int) -> list[float | None]:
            numbers = np.asarray(values[chosen], np.float64).round(digits).tolist()
            return [n if own else None for n, own in zip(numbers, sampled.tolist(), strict=True)]

        ids = s.token_ids[chosen].tolist()
        return {
            "train_version": train_version,
            "why": self.why,
            "group_id": s.group_id,
            "reward": round(s.reward, 6),
            "temperature": s.temperature,
            "num_tokens": len(s.token_ids),
            "omitted_at": MAX_TOKENS // 2 if len(s.token_ids) > MAX_TOKENS else None,
            "token_ids": ids,
            "texts": token_texts(ids, tokenizer),
            "logprobs": of_replies(s.behavior_logprobs, 4),
            "versions": s.policy_versions[chosen].tolist(),
            "advantages": of_replies(self.advantages, 4),
            "in_loss": self.in_loss[chosen].astype(int).tolist(),
        }


def shown_tokens(num_tokens: int) -> NDArray[np.intp]:
    """Return the indices of a trajectory's tokens that a sample keeps: all, or both ends."""
    if num_tokens <= MAX_TOKENS:
        return np.arange(num_tokens)
    half = MAX_TOKENS // 2
    return np.concatenate([np.arange(half), np.arange(num_tokens - half, num_tokens)])


def token_texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token.

    Where a character is split over tokens, the last of them has it and the others are empty.
    """
    texts = [tokenizer.decode([token]) for token in token_ids]
    start = 0
    while start < len(texts):
        stop = start + 1
        if "\ufffd" in texts[start]:
            for end in range(stop + 1, min(start + _LONGEST_CHARACTER, len(texts)) + 1):
                whole = tokenizer.decode(list(token_ids[start:end]))
                if "\ufffd" not in whole:
                    texts[start:end] = [""] * (end - start - 1) + [whole]
                    stop = end
                    break
        start = stop
    return texts


def choose_samples(minibatches: Sequence[Minibatch], *, count: int, seed: int) -> list[Sample]:
    """Return at most ``count`` different trajectories of a step, whose targets have been made.

    First that of the highest and that of the lowest reward, then the one with the oldest token in
    the loss, then others at random.

    Args:
        minibatches: of the step.
        count: at most.
        seed: of the choice.
    """
    places = [(m, i) for m in minibatches for i in range(len(m.sequences))]
    sequences = [m.sequences[i] for m, i in places]
    return [
        _sample(why, *places[index])
        for index, why in _choice(sequences, count=count, seed=seed).items()
    ]


def _choice(sequences: Sequence[TrainSequence], *, count: int, seed: int) -> dict[int, str]:
    """Return the reason by index of each chosen sequence."""
    if not sequences:
        return {}
    rewards = [s.reward for s in sequences]
    oldest = [int(s.policy_versions[s.loss_mask].min()) for s in sequences]
    others = np.random.default_rng(seed).permutation(len(sequences)).tolist()
    wanted = (
        (rewards.index(max(rewards)), "best"),
        (rewards.index(min(rewards)), "worst"),
        (oldest.index(min(oldest)), "oldest"),
        *((index, "random") for index in others),
    )
    chosen: dict[int, str] = {}
    for index, why in wanted:
        if len(chosen) < count:
            chosen.setdefault(index, why)
    return chosen


def _sample(why: str, minibatch: Minibatch, index: int) -> Sample:
    targets, sequence = minibatch.targets, minibatch.sequences[index]
    assert targets is not None, "targets are made before samples are taken"
    start = sum(int(s.loss_mask.sum()) for s in minibatch.sequences[:index])
    mask = sequence.loss_mask
    own = slice(start, start + int(mask.sum()))
    advantages = np.zeros(len(mask), np.float32)
    advantages[mask] = targets.advantages[own].float().cpu().numpy()
    in_loss = mask.copy()
    if targets.correction is not None:
        in_loss[mask] = targets.correction.mask[own].cpu().numpy()
    return Sample(why=why, sequence=sequence, advantages=advantages, in_loss=in_loss)
