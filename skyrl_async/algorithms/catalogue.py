"""What there is: every estimator, correction, loss and penalty, with its equation and paper.

The docstrings are the source; ``python -m skyrl_async.algorithms`` prints them as one table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

from skyrl_async.algorithms import (
    advantages,
    aggregation,
    behavior_losses,
    corrections,
    distillation,
    kl,
    off_policy_returns,
    policy_losses,
    proximal,
    regularizers,
    returns,
    reward_shaping,
    sequence_losses,
    step_size,
    value_loss,
)
from skyrl_async.algorithms.guidance import WHEN_IT_HELPS, configuration

_KINDS: tuple[tuple[str, tuple[ModuleType, ...]], ...] = (
    ("advantage", (advantages, returns, off_policy_returns)),
    ("loss", (policy_losses, sequence_losses, behavior_losses)),
    ("correction", (corrections, proximal)),
    ("aggregation", (aggregation,)),
    ("divergence", (kl,)),
    ("regularizer", (regularizers,)),
    ("distillation", (distillation,)),
    ("shaping", (reward_shaping,)),
    ("critic", (value_loss,)),
    ("step size", (step_size,)),
)
_HELPERS = frozenset({"estimate", "turn_starts", "m2_mask", "divergence"})
"""Public functions that are no method by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One method of the catalogue.

    Attributes:
        name: of the function.
        kind: what it is for.
        summary: first line of its docstring.
        when: it helps.
        equation: in LaTeX.
        source: paper or code.
        options: keyword arguments with their defaults.
        configuration: overrides with which a run uses it; none if every run does.
        function: itself.
    """

    name: str
    kind: str
    summary: str
    when: str
    equation: str
    source: str
    options: Mapping[str, Any]
    configuration: tuple[str, ...]
    function: Callable[..., Any]


def entries() -> Iterator[Entry]:
    """Yield all methods, by kind, in the order of the files."""
    for kind, modules in _KINDS:
        for module in modules:
            for name, function in vars(module).items():
                public = inspect.isfunction(function) and not name.startswith("_")
                if public and function.__module__ == module.__name__ and name not in _HELPERS:
                    yield _entry(kind, name, function)


def losses() -> Mapping[str, Callable[..., Any]]:
    """Return the policy losses by name."""
    return MappingProxyType({e.name: e.function for e in entries() if e.kind == "loss"})


def _entry(kind: str, name: str, function: Callable[..., Any]) -> Entry:
    text = inspect.getdoc(function) or ""
    math = re.search(r"\.\. math::\s*\n?(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    source = re.search(r"^Source: (.*?)(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return Entry(
        name=name,
        kind=kind,
        summary=text.partition("\n")[0],
        when=WHEN_IT_HELPS[name],
        equation=_one_line(math.group(1)) if math else "",
        source=_one_line(source.group(1)) if source else "",
        options={
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
        },
        configuration=configuration(name, kind),
        function=function,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
