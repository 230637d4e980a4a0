"""The keys of the configuration: their limits in words, near misses, and the reference text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from skyrl_async.config import Config
from skyrl_async.config_section import Because, Section, show

FREE_KEYS = ("environment.options", "algorithm.loss_options", "optimizer.groups")
"""Keys whose mappings have keys of their own, such as those of the environment and of the loss."""

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_BOUNDS = {
    annotated_types.Ge: ("ge", ">="),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "<="),
    annotated_types.Lt: ("lt", "<"),
}
_MIN_SIMILARITY = 0.6
_OTHER_SECTION_FACTOR = 0.85
_SUGGESTION_WINDOW = 0.1
_MAX_SUGGESTIONS = 3


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every section and key with its dotted path, in the order of definition."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if _is_section(field):
            yield from _fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


SECTIONS: Mapping[str, FieldInfo] = MappingProxyType(
    {path: field for path, field in _fields(Config) if _is_section(field)}
)
"""Dotted path -> field, of every section."""

KEYS: Mapping[str, FieldInfo] = MappingProxyType(
    {path: field for path, field in _fields(Config) if not _is_section(field)}
)
"""Dotted path -> field, of everything that takes a value."""


def keys_of(section: str) -> list[str]:
    """Return the names directly in a section, or at the top for ``""``."""
    model = SECTIONS[section].annotation if section else Config
    return list(model.model_fields)  # type: ignore[union-attr]


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of a choice, empty if the field is none."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def is_text(field: FieldInfo) -> bool:
    """Return whether the field takes text, choices included."""
    if get_origin(field.annotation) in (dict, tuple):
        return False
    return bool(choices(field)) or str in (field.annotation, *get_args(field.annotation))


def limit(field: FieldInfo) -> str:
    """Return what a field takes, for example ``an integer >= 1 or null``."""
    if choices(field):
        return "one of " + ", ".join(choices(field))
    if get_origin(field.annotation) is dict:
        return "a mapping"
    if get_origin(field.annotation) is tuple:
        return "a list of texts"
    kinds = get_args(field.annotation) or (field.annotation,)
    first, *others = (_TYPE_NAMES[kind] for kind in kinds)
    if float in kinds and not any(hasattr(e, "le") or hasattr(e, "lt") for e in field.metadata):
        first = "a finite number"
    text = " or ".join([" ".join([first, " and ".join(_bounds(field))]).strip(), *others])
    reasons = [entry.reason for entry in field.metadata if isinstance(entry, Because)]
    return "; ".join([text, *reasons])


def _bounds(field: FieldInfo) -> Iterator[str]:
    for entry in field.metadata:
        if type(entry) in _BOUNDS:
            attribute, sign = _BOUNDS[type(entry)]
            yield f"{sign} {show(getattr(entry, attribute))}"
        elif getattr(entry, "pattern", None):
            yield f"of the form {entry.pattern}"


def default_of(field: FieldInfo) -> Any:
    """Return the default value of a key."""
    return field.get_default(call_default_factory=True)


def suggest(path: str) -> list[str]:
    """Return up to three keys or sections that an unknown dotted path may mean, best first."""
    scores = {known: _similarity(path, known) for known in (*KEYS, *SECTIONS)}
    best = max(scores.values())
    if best < _MIN_SIMILARITY:
        return []
    close = [known for known, score in scores.items() if score >= best - _SUGGESTION_WINDOW]
    return sorted(close, key=lambda known: -scores[known])[:_MAX_SUGGESTIONS]


def _similarity(path: str, known: str) -> float:
    section, _, leaf = path.rpartition(".")
    known_section, _, known_leaf = known.rpartition(".")
    leaf_ratio = _ratio(leaf, known_leaf)
    if section in SECTIONS or not section:
        # The section is right, or there is none: only the last part can say what was meant.
        own = leaf_ratio if section == known_section else _OTHER_SECTION_FACTOR * leaf_ratio
        return own if section else max(own, _ratio(path, known))
    return (_ratio(path, known) + leaf_ratio) / 2


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def describe_config() -> str:
    """Return the reference of all keys, by section: key, limits, default, one line each."""
    lines: list[str] = []
    top = [path for path in KEYS if "." not in path]
    for section, keys in (
        ("", top),
        *((s, [f"{s}.{k}" for k in keys_of(s) if f"{s}.{k}" in KEYS]) for s in SECTIONS),
    ):
        if section:
            model = SECTIONS[section].annotation
            lines += ["", f"{section}: {(model.__doc__ or '').strip()}"]
        for path in keys:
            field = KEYS[path]
            lines.append(f"  {path}={show(default_of(field))}  ({limit(field)})")
            lines.append(f"      {field.description}")
    return "\n".join(lines)
