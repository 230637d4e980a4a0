"""A policy loss by its name, or a user's own by ``module:function``; and whether it is one."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from skyrl_async.algorithms.catalogue import losses
from skyrl_async.algorithms.tokens import LossTokens, TokenLoss

_NUM_TOKENS = 4
"""Of the call that shows what a loss returns."""


def find_loss(name: str) -> Callable[..., Any]:
    """Return a policy loss by name, or by ``module:function``.

    Raises:
        ValueError: if there is none.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        known = losses()
        if name in known:
            return known[name]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
        raise ValueError(f"algorithm.loss={name}: no such loss; {hint}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may do anything when it is imported, also exit
        raise ValueError(
            f"algorithm.loss={name}: cannot be imported ({type(error).__name__}: {error}); give "
            "module:function, with the module on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"algorithm.loss={name}: is no function but {type(function).__name__}")
    return function


def check_loss(name: str, options: Mapping[str, Any]) -> None:
    """Check that a loss exists, takes these options, and returns what a loss returns.

    It is called once with a few tokens.

    Raises:
        ValueError: naming the option, and the ones that there are; or what the call came to.
    """
    function = find_loss(name)
    _check_options(name, function, options)
    what = f"algorithm.loss={name}"
    if options:
        what += f", algorithm.loss_options={dict(options)}"
    try:
        result = function(_few_tokens(), **options)
    except Exception as error:
        reason = str(error) or "no message"
        raise ValueError(f"{what}: {reason} ({type(error).__name__}); change it") from error
    for problem in _problems_of(result):
        raise ValueError(f"{what}: called with {_NUM_TOKENS} tokens, {problem}; return a TokenLoss")


def _few_tokens() -> LossTokens:
    """Return two sequences of which one has become likelier, the other less likely."""
    current = torch.tensor([-0.5, -1.0, -2.0, -3.0], requires_grad=True)
    return LossTokens(
        current_logprobs=current,
        proximal_logprobs=torch.tensor([-0.6, -1.1, -1.9, -2.9]),
        behavior_logprobs=torch.tensor([-0.7, -1.2, -1.8, -2.8]),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
    )


def _problems_of(result: Any) -> Iterator[str]:
    """Yield what is wrong with the outcome of a loss."""
    if inspect.iscoroutine(result):
        result.close()
    if not isinstance(result, TokenLoss):
        yield f"it returned {type(result).__name__}"
        return
    for name in ("loss", "clipped"):
        tensor = getattr(result, name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != (_NUM_TOKENS,):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            yield f"its {name} is {found}, not of shape ({_NUM_TOKENS},)"
            return
    if not result.loss.requires_grad:
        yield "its loss has no gradient"
    if not result.loss.isfinite().all():
        yield "its loss is not finite"
    if result.clipped.dtype != torch.bool:
        yield f"its clipped is {result.clipped.dtype}, not bool"


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C have none
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    others = list(parameters.values())[1:]
    # What takes a tensor is given by the learner.
    known = [
        p.name
        for p in others
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and "Tensor" not in str(p.annotation)
    ]
    is_ours = ":" not in name
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            there = ", ".join(known) or "no options"
            hint = f"did you mean {close[0]}?" if close else f"{name} has {there}"
            raise ValueError(f"algorithm.loss_options.{option}={value}: unknown option; {hint}")
        if is_ours and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"algorithm.loss_options.{option}={value!r}: must be a number")
