"""Sampling for all rows of a decode step at once, with logprobs over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skyrl_async.types import Sampling


def sample_tokens(
    logits: Tensor, samplings: Sequence[Sampling], *, generator: torch.Generator
) -> tuple[list[int], list[float]]:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: ``[n, V]``, any floating type; computed in float32.
        samplings: one per row. ``top_p`` and ``top_k`` restrict which tokens can be sampled, never
            the logprobs.
        generator: of the random numbers, on the CPU, so that they are the same for any device; one
            per row is drawn whatever the temperatures are.

    Returns:
        Token ids and natural-log probabilities under ``softmax(logits / temperature)`` (greedy
        rows: temperature 1). The logprob is NaN for a row whose logits have NaN or +inf, or are
        all -inf.
    """
    device = logits.device
    scaled = logits.float()
    temperatures = [s.temperature for s in samplings]
    if temperatures.count(1.0) != len(temperatures):
        divisors = torch.tensor([t or 1.0 for t in temperatures]).unsqueeze(1)
        scaled = scaled / divisors.to(device, non_blocking=True)
    probabilities = torch.softmax(scaled, dim=-1)
    candidates = _restrict(probabilities, samplings)
    # In float64 rounding cannot push the draw past the last token, nor starve unlikely ones.
    cumulative = candidates.cumsum(-1, dtype=torch.float64)
    draws = torch.rand((len(samplings), 1), generator=generator, dtype=torch.float64)
    draws = draws.to(device, non_blocking=True)
    token_ids = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    token_ids.clamp_(max=logits.shape[1] - 1)
    greedy = [t == 0 for t in temperatures]
    if any(greedy):
        rows = torch.tensor(greedy).unsqueeze(1).to(device, non_blocking=True)
        token_ids = torch.where(rows, scaled.argmax(-1, keepdim=True), token_ids)
    logprobs = probabilities.gather(1, token_ids).log_()
    # One copy to the host, which waits for the device; float64 holds every token id.
    chosen = torch.cat((token_ids.double(), logprobs.double()), dim=1).T.cpu().tolist()
    return [int(token_id) for token_id in chosen[0]], chosen[1]


def _restrict(probabilities: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return ``probabilities`` with the tokens outside top-k and top-p set to zero."""
    limited = [i for i, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1]
    if not limited:
        return probabilities
    device, size = probabilities.device, probabilities.shape[1]
    rows, top_k, top_p = (
        torch.tensor(values).to(device, non_blocking=True)
        for values in (
            limited,
            [[samplings[i].top_k or size] for i in limited],
            [[samplings[i].top_p] for i in limited],
        )
    )
    ordered, order = probabilities.index_select(0, rows).sort(-1, descending=True)
    kept = torch.where(torch.arange(size, device=device) < top_k, ordered, 0)
    # A token stays if those before it do not reach top_p of what top-k left.
    before = kept.cumsum(-1) - kept
    kept = torch.where(before < top_p * kept.sum(-1, keepdim=True), kept, 0)
    restricted = probabilities.clone()
    return restricted.index_copy_(0, rows, torch.zeros_like(kept).scatter(-1, order, kept))
