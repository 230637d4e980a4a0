"""Recursions over the tokens of each sequence, for all sequences of a batch at once.

Shapes: ``T`` tokens of whole sequences, end to end, ``S`` sequences. ``sequence_ids [T]`` names the
sequence of each token; a sequence's tokens are in order and next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(sequence_ids: Tensor, *tensors: Tensor) -> None:
    """Refuse tensors that are not all ``[T]``.

    Raises:
        ValueError: if they are not.
    """
    shapes = {tuple(t.shape) for t in (sequence_ids, *tensors)}
    if len(shapes) > 1 or sequence_ids.ndim != 1:
        raise ValueError(f"tokens need tensors of one shape [T], got {sorted(shapes)}")


def aligned(sequence_ids: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors ``[T]`` in one float type, at least float32.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(sequence_ids, *tensors)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def next_in_sequence(values: Tensor, sequence_ids: Tensor, after_last: Tensor | None) -> Tensor:
    """Return ``[T]``: the value of the next token of the sequence.

    Args:
        values: ``[T]``.
        sequence_ids: ``[T]``, the sequence of each token.
        after_last: ``[S]``, what follows the last token of each sequence; 0 if None.
    """
    is_last = torch.ones_like(sequence_ids, dtype=torch.bool)
    is_last[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    beyond = values.new_zeros(()) if after_last is None else after_last.to(values)[sequence_ids]
    return torch.where(is_last, beyond, values.roll(-1))


def discounted_sums(terms: Tensor, factors: Tensor, sequence_ids: Tensor) -> Tensor:
    r"""Return ``[T]``: sums to the end of each sequence, discounted token by token.

    .. math:: y_t = x_t + f_t y_{t+1}

    with 0 after the last token. One step of the loop takes the tokens that are equally far from the
    end of their sequences.

    Args:
        terms: ``[T]``, x.
        factors: ``[T]``, f.
        sequence_ids: ``[T]``, the sequence of each token.

    Raises:
        ValueError: if the tokens of a sequence are not next to each other.
    """
    if terms.numel() == 0:
        return terms.clone()
    order, counts = _by_distance_to_end(sequence_ids)
    first, *terms_later = torch.split(terms[order], counts)
    _, *factors_later = torch.split(factors[order], counts)
    sums: list[Tensor] = [first]
    for term, factor in zip(terms_later, factors_later, strict=True):
        sums.append(torch.addcmul(term, factor, sums[-1][: len(term)]))
    result = torch.empty_like(terms)
    result[order] = torch.cat(sums)
    return result


def _by_distance_to_end(sequence_ids: Tensor) -> tuple[Tensor, list[int]]:
    """Return the tokens by distance to their sequence's end, and how many there are of each.

    Those of one distance are in the order of their sequences' lengths, the longest first: the
    sequences that go on to the next distance are then a prefix of those that reached this one.
    """
    present, lengths = torch.unique_consecutive(sequence_ids, return_counts=True)
    if len(present.unique()) != len(present):
        raise ValueError("the tokens of a sequence must be next to each other")
    rank = lengths.argsort(descending=True, stable=True).argsort()
    steps = torch.arange(len(sequence_ids), device=sequence_ids.device)
    distance = (lengths.cumsum(0) - 1).repeat_interleave(lengths) - steps
    counts = torch.bincount(distance)
    order = torch.empty_like(steps)
    order[(counts.cumsum(0) - counts)[distance] + rank.repeat_interleave(lengths)] = steps
    return order, counts.tolist()
