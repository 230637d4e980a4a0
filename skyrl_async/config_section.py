"""What every part of the configuration has in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

Texts = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: tuple(value) if type(value) is list else value)
]
"""A list in YAML."""


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, infinities and NaN refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True, slots=True)
class Because:
    """Why a key has its limits, for the words that name them; in the annotation of its type."""

    reason: str


def unread(path: str, section: Section, names: tuple[str, ...], *, why: str) -> Iterator[str]:
    """Yield a line for each of some keys that was set although nothing reads it.

    Args:
        path: of the section.
        section: that the keys are in.
        names: of the keys.
        why: the values that make it so, what follows, and a remedy besides removing the key.
    """
    for name in names:
        value = getattr(section, name)
        if value != type(section).model_fields[name].default:
            yield f"{path}.{name}={show(value)}{why}, or remove {name}"


def show(value: Any) -> str:
    """Return a value as it would be written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        return repr(list(value))
    return value if isinstance(value, str) else repr(value)
