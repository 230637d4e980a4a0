"""The formulas of corrections, aggregation, KL and critic loss, in plain float64 double loops.

Quantities of tokens are nested: ``x[i][t]`` is of token t of sequence i. Nothing is vectorized,
and products are products of ratios, not sums of logarithms.
"""

from __future__ import annotations

import math

Nested = list[list[float]]
NestedMask = list[list[bool]]


def ratio(log_ratios: Nested, i: int, t: int) -> float:
    return math.exp(log_ratios[i][t])


def product(log_ratios: Nested, i: int) -> float:
    result = 1.0
    for t in range(len(log_ratios[i])):
        result *= ratio(log_ratios, i, t)
    return result


def geometric_mean(log_ratios: Nested, i: int) -> float:
    return product(log_ratios, i) ** (1 / len(log_ratios[i]))


def token_weights(log_ratios: Nested, cap: float) -> Nested:
    weights = []
    for i in range(len(log_ratios)):
        weights.append([])
        for t in range(len(log_ratios[i])):
            weights[i].append(min(ratio(log_ratios, i, t), cap))
    return weights


def sequence_weights(log_ratios: Nested, cap: float) -> Nested:
    weights = []
    for i in range(len(log_ratios)):
        weights.append([])
        for _ in range(len(log_ratios[i])):
            weights[i].append(min(product(log_ratios, i), cap))
    return weights


def geometric_weights(log_ratios: Nested, cap: float) -> Nested:
    weights = []
    for i in range(len(log_ratios)):
        weights.append([])
        for _ in range(len(log_ratios[i])):
            weights[i].append(min(geometric_mean(log_ratios, i), cap))
    return weights


def token_mask(log_ratios: Nested, low: float, high: float) -> NestedMask:
    mask = []
    for i in range(len(log_ratios)):
        mask.append([])
        for t in range(len(log_ratios[i])):
            mask[i].append(low <= ratio(log_ratios, i, t) <= high)
    return mask


def sequence_mask(log_ratios: Nested, low: float, high: float) -> NestedMask:
    mask = []
    for i in range(len(log_ratios)):
        mask.append([])
        for _ in range(len(log_ratios[i])):
            mask[i].append(low <= product(log_ratios, i) <= high)
    return mask


def geometric_mask(log_ratios: Nested, low: float, high: float) -> NestedMask:
    mask = []
    for i in range(len(log_ratios)):
        mask.append([])
        for _ in range(len(log_ratios[i])):
            mask[i].append(low <= geometric_mean(log_ratios, i) <= high)
    return mask


def veto_mask(log_ratios: Nested, below: float) -> NestedMask:
    mask = []
    for i in range(len(log_ratios)):
        vetoed = False
        for t in range(len(log_ratios[i])):
            if ratio(log_ratios, i, t) < below:
                vetoed = True
        mask.append([not vetoed] * len(log_ratios[i]))
    return mask


def divergence(kind: str, log_ratio: float) -> float:
    if kind == "k2":
        return log_ratio**2 / 2
    return math.exp(log_ratio) - 1 - log_ratio


def divergence_mask(log_ratios: Nested, kind: str, limit: float, level: str) -> NestedMask:
    mask = []
    for i in range(len(log_ratios)):
        mask.append([])
        values = []
        for t in range(len(log_ratios[i])):
            values.append(divergence(kind, log_ratios[i][t]))
        for t in range(len(log_ratios[i])):
            if level == "token":
                judged = values[t]
            elif level == "sequence_mean":
                judged = sum(values) / len(values)
            elif level == "sequence_sum":
                judged = sum(values)
            else:
                judged = max(values)
            mask[i].append(judged <= limit)
    return mask


def opsm_mask(proximal: Nested, behavior: Nested, advantages: Nested, delta: float) -> NestedMask:
    mask = []
    for i in range(len(proximal)):
        mask.append([])
        drift = 0.0
        for t in range(len(proximal[i])):
            pi_old = math.exp(behavior[i][t])
            pi = math.exp(proximal[i][t])
            drift += math.log(pi_old / pi) / len(proximal[i])
        for t in range(len(proximal[i])):
            mask[i].append(not (advantages[i][t] < 0 and drift > delta))
    return mask


def mean_weight(weights: Nested, mask: NestedMask) -> float:
    total, count = 0.0, 0
    for i in range(len(weights)):
        for t in range(len(weights[i])):
            if mask[i][t]:
                total += weights[i][t]
                count += 1
    return total / count


def aggregate(
    losses: Nested, prompts: list[int], mask: NestedMask, kind: str, constant_length: int = 1
) -> float:
    """Aggregate ``losses[i][t]`` of sequences of prompt ``prompts[i]``."""
    if kind == "token_mean":
        return _mean(_kept(losses, mask, range(len(losses))))
    if kind == "prompt_mean":
        means = []
        for prompt in sorted(set(prompts)):
            kept = _kept(losses, mask, [i for i in range(len(losses)) if prompts[i] == prompt])
            if kept:
                means.append(_mean(kept))
        return _mean(means)
    of_sequences = []
    for i in range(len(losses)):
        kept = _kept(losses, mask, [i])
        if kept:
            of_sequences.append(
                _mean(kept) if kind == "sequence_mean" else sum(kept) / constant_length
            )
    return _mean(of_sequences)


def _kept(losses: Nested, mask: NestedMask, sequences: range | list[int]) -> list[float]:
    kept = []
    for i in sequences:
        for t in range(len(losses[i])):
            if mask[i][t]:
                kept.append(losses[i][t])
    return kept


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def k3(current: float, reference: float) -> float:
    """Estimate from the two probabilities, not their logarithms."""
    return reference / current - math.log(reference / current) - 1


def value_loss(value: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """Return loss and its derivative by ``value``."""
    clipped = min(max(value, old - clip), old + clip)
    plain, pessimistic = (value - target) ** 2, (clipped - target) ** 2
    if pessimistic > plain:
        return 0.5 * pessimistic, 0.0
    return 0.5 * plain, value - target
