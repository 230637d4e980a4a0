"""Peak memory of logprobs and their gradient over a vocabulary of 151,936 words.

Each way is measured in a process of its own: ``chunked`` is ours, ``whole`` the matrix of logits,
``torch`` is ``torch.nn.functional.linear_cross_entropy`` where PyTorch has it.
``logprob_memory_ratio`` is the peak of ``chunked`` over the bytes of one matrix of logits, of which
``whole`` needs several.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from measuring import peak_bytes, seconds

from skyrl_async.learner.chunked_head import head_outputs

VOCABULARY = 151_936


def logprobs_alone(kind: str, num_tokens: int, width: int) -> tuple[float, int]:
    """Return seconds and peak bytes of logprobs with gradients, in this process.

    Args:
        kind: of computation.
        num_tokens: in one call.
        width: of the hidden states; the weight's gradient is part of the peak.
    """
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, device=device).requires_grad_()
    weight = (torch.randn(VOCABULARY, width, device=device) / 16).requires_grad_()
    targets = torch.randint(VOCABULARY, (num_tokens,), device=device)
    ones = torch.ones(num_tokens, device=device)

    def run() -> None:
        if kind == "chunked":
            logprobs, _ = head_outputs(hidden, weight, targets, ones)
        elif kind == "whole":
            every = torch.log_softmax((hidden @ weight.T) / ones[:, None], -1)
            logprobs = every.gather(1, targets[:, None])
        else:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, acc_policy="compact")
            logprobs = -torch.nn.functional.linear_cross_entropy(
                hidden / ones[:, None], weight, targets, reduction="none", options=options
            )
        logprobs.sum().backward()

    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(run, device)), device)
    return taken[0], peak


def logprob_gradient_error(num_tokens: int, width: int) -> float:
    """Return how far the gradients are from those of the plain formula, relative to the largest.

    The reference makes all logits of a few tokens at a time: rows of the matrix do not depend on
    each other, so its gradients are those of the whole matrix, summed up in float64.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, device=device).requires_grad_()
    weight = (torch.randn(VOCABULARY, width, device=device) / 16).requires_grad_()
    targets = torch.randint(VOCABULARY, (num_tokens,), device=device)
    shares = torch.randn(num_tokens, device=device)
    logprobs, _ = head_outputs(hidden, weight, targets, torch.ones(num_tokens, device=device))
    (logprobs * shares).sum().backward()
    of_hidden, of_weight = torch.empty(hidden.shape).double(), torch.zeros(weight.shape).double()
    exact = weight.detach().double().requires_grad_()
    for start in range(0, num_tokens, 512):
        part = slice(start, start + 512)
        rows = hidden.detach()[part].double().requires_grad_()
        every = torch.log_softmax(rows @ exact.T, -1).gather(1, targets[part, None])[:, 0]
        gradients = torch.autograd.grad((every * shares[part].double()).sum(), (rows, exact))
        of_hidden[part] = gradients[0].cpu()
        of_weight += gradients[1].cpu()
    errors = []
    for ours, theirs in ((hidden.grad, of_hidden), (weight.grad, of_weight)):
        assert ours is not None
        errors.append(float((ours.cpu() - theirs).abs().max() / theirs.abs().max()))
    return max(errors)


def measure_logprobs(*, quick: bool) -> dict[str, Any]:
    """Return the memory of logprobs; the whole matrix of many tokens would not fit here."""
    many, few, width = (3072, 256, 64) if quick else (8192, 1024, 256)
    cases = [("chunked", many), ("whole", few)]
    if not quick:
        cases.append(("chunked", few))
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            cases.append(("torch", few))
    rows = []
    context = multiprocessing.get_context("spawn")
    for kind, num_tokens in cases:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            taken, peak = process.submit(logprobs_alone, kind, num_tokens, width).result(
                timeout=600
            )
        rows.append(
            {
                "kind": kind,
                "num_tokens": num_tokens,
                "hidden_size": width,
                "seconds": taken,
                "peak_bytes": peak,
                "peak_over_logits": peak / (num_tokens * VOCABULARY * 4),
            }
        )
    return {
        "logprob_memory_ratio": rows[0]["peak_over_logits"],
        "logprob_gradient_error": logprob_gradient_error(many, width),
        "logprob_rows": rows,
    }
