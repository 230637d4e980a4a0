"""The demonstrations of one fine-tuning: read, split, and in which order they are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skyrl_async.config import Config
from skyrl_async.learner.demonstrations import encode_demonstrations, read_demonstrations
from skyrl_async.learner.policy import load_tokenizer, vocabulary_size
from skyrl_async.rollout.chat import Chat
from skyrl_async.runtime.settings import policy_source
from skyrl_async.types import TrainSequence

_HELD_OUT_STREAM = 1 << 31
"""Epochs are numbered below this, so that the split has random numbers of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationSet:
    """What is trained and what is held out.

    Attributes:
        training: in the order of the file.
        held_out: likewise; empty if nothing is.
        num_dropped: longer than the context.
        sha256: of the tokens and masks of both.
    """

    training: tuple[TrainSequence, ...]
    held_out: tuple[TrainSequence, ...]
    num_dropped: int
    sha256: str


def load_demonstration_set(config: Config) -> DemonstrationSet:
    """Read and check the whole file of ``sft.data``, and split it.

    Raises:
        DemonstrationError: naming every line that cannot be used.
        ValueError: if no file is given, too little is left to train on, or there is no tokenizer.
    """
    sft = config.sft
    if sft.data is None:
        raise ValueError("sft.data is not set: give a file of JSON lines")
    demonstrations = read_demonstrations(sft.data)
    source = policy_source(config)
    encoded = encode_demonstrations(
        demonstrations,
        Chat(load_tokenizer(source)),
        path=sft.data,
        max_tokens=config.engine.context_length,
        vocabulary_size=vocabulary_size(source),
        overlong=sft.overlong,
    )
    held_out = held_out_indices(
        len(encoded.sequences), fraction=sft.eval_fraction, seed=config.seed
    )
    return DemonstrationSet(
        training=tuple(s for i, s in enumerate(encoded.sequences) if i not in held_out),
        held_out=tuple(encoded.sequences[i] for i in sorted(held_out)),
        num_dropped=encoded.num_dropped,
        sha256=fingerprint(encoded.sequences),
    )


def held_out_indices(num_examples: int, *, fraction: float, seed: int) -> frozenset[int]:
    """Draw the share that is held out: at least one, unless the fraction is 0.

    Raises:
        ValueError: if nothing is left to train on.
    """
    if not fraction:
        return frozenset()
    count = max(1, round(fraction * num_examples))
    if count >= num_examples:
        raise ValueError(
            f"sft.eval_fraction={fraction}: would hold out {count} of {num_examples} "
            "demonstrations and leave none to train on; lower it or give more"
        )
    order = np.random.default_rng([seed, _HELD_OUT_STREAM]).permutation(num_examples)
    return frozenset(order[:count].tolist())


def fingerprint(sequences: Iterable[TrainSequence]) -> str:
    """Return the SHA-256 of the tokens and masks of all sequences, in order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence.token_ids).to_bytes(8, "little"))
        digest.update(sequence.token_ids.astype("<i4").tobytes())
        digest.update(sequence.loss_mask.tobytes())
    return digest.hexdigest()


def steps_per_epoch(num_examples: int, examples_per_step: int) -> int:
    """Return how many steps one pass takes; the last one may have fewer examples than asked."""
    return -(-num_examples // examples_per_step)


def batch_at(
    step: int, *, num_examples: int, examples_per_step: int, seed: int
) -> NDArray[np.int64]:
    """Return the indices of the examples of one step, counted from 0.

    Every epoch is a new random order, cut into batches of sizes that differ by at most one. So a
    resumed fine-tuning goes on in the middle of an epoch.

    Args:
        step: over all epochs.
        num_examples: to train on.
        examples_per_step: at most.
        seed: of the order.
    """
    per_epoch = steps_per_epoch(num_examples, examples_per_step)
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    first, last = (num_examples * n // per_epoch for n in (number, number + 1))
    return order[first:last]
