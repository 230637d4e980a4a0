"""From YAML files and dotted overrides to a checked configuration, with all errors at once.

A file may name others under ``base:`` (one path or a list, relative to the file). Later layers win:
bases in their order, then the file, then the overrides in theirs. A section is merged key by key;
a value is replaced, ``environment.options`` as a whole unless an override names one of its keys.
``algorithm: NAME`` stands for the file of a preset, at the place where it is said; it takes the
place of an earlier one. Where ``algorithm.loss`` is replaced, a preset's options of the other loss
go with it.
Nothing is read from the environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from skyrl_async.config import Config
from skyrl_async.config_keys import (
    FREE_KEYS,
    KEYS,
    choices,
    default_of,
    describe_config,
    limit,
    show,
)
from skyrl_async.config_layers import Layers, prefixes, quote, remove
from skyrl_async.config_yaml import dump

__all__ = ["ConfigError", "describe_config", "dump_config", "load_config"]


class ConfigError(ValueError):
    """The configuration cannot be used.

    Attributes:
        problems: one line each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        super().__init__("\n".join((f"{count} {noun} in the configuration:", *self._lines())))

    def _lines(self) -> Iterator[str]:
        return (f"  {problem}" for problem in self.problems)


def load_config(file: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a file, its bases and the overrides.

    Args:
        file: YAML; None starts from the defaults.
        overrides: ``a.b=v``, ``--a.b=v`` or ``--a.b`` followed by ``v``; values are YAML.

    Raises:
        ConfigError: naming every problem that can be found in one go.
    """
    layers = Layers()
    if file is not None:
        layers.read(file)
    layers.apply(overrides)
    return _validated(layers)


def dump_config(config: Config) -> str:
    """Return all values as YAML that :func:`load_config` reads back to an equal configuration."""
    return dump(config.model_dump())


def _validated(layers: Layers) -> Config:
    """Return the configuration of the values.

    Raises:
        ConfigError: with the problems of the layers, of single values and across them.
    """
    try:
        config = Config.model_validate(layers.values, strict=True)
    except ValidationError as error:
        problems, broken = _explain_validation(error.errors(), layers)
        layers.problems += problems
        if broken:
            # What depends on several values is checked on the rest, with defaults for the broken.
            layers.doubtful |= broken
            for path in broken:
                remove(layers.values, path)
            try:
                Config.model_validate(layers.values, strict=True)
            except ValidationError as second:
                layers.problems += _explain_validation(second.errors(), layers)[0]
    if layers.problems:
        raise ConfigError(layers.problems)
    return config


def _explain_validation(
    errors: Sequence[ErrorDetails], layers: Layers
) -> tuple[list[str], set[str]]:
    """Return a line for each error, and the dotted paths of the values that are wrong alone."""
    problems: list[str] = []
    broken: set[str] = set()
    for error in errors:
        if not error["loc"]:
            problems += _explain_across(str(error["ctx"]["error"]), layers)
            continue
        dotted = next(p for p in prefixes(error["loc"]) if p in KEYS)
        if dotted in broken:
            continue
        broken.add(dotted)
        problems.append(_explain_value(dotted, error, layers))
    return problems, broken


def _explain_value(dotted: str, error: ErrorDetails, layers: Layers) -> str:
    known = KEYS[dotted]
    origin = layers.origins[dotted]
    value = error["input"]
    if dotted in FREE_KEYS and len(error["loc"]) > 2:
        return f"{dotted}: key {value!r} ({origin}): must be text; put it in quotes"
    must = f"must be {limit(known)}"
    close = difflib.get_close_matches(str(value).lower(), choices(known), n=1, cutoff=0.4)
    if close:
        must += f"; did you mean {close[0]}?"
    elif isinstance(value, int | float) and limit(known).startswith("text"):
        must += "; put it in quotes"
    else:
        must += f"; the default is {show(default_of(known))}"
    return f"{dotted}={quote(value)} ({origin}): {must}"


def _explain_across(text: str, layers: Layers) -> Iterator[str]:
    """Yield the lines about several values, unless one of those is wrong or missing itself."""
    for line in text.splitlines():
        paths = [p for p in re.findall(r"([a-z_0-9.]+)=", line) if p in KEYS]
        if layers.unreadable or layers.doubtful.intersection(paths):
            continue
        origins = (f"{p} from {layers.origins[p]}" for p in paths if p in layers.origins)
        origin = ", ".join(dict.fromkeys(origins))
        yield f"{line} ({origin})" if origin else line
