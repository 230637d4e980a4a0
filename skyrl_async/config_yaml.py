"""YAML in the JSON-like sense of version 1.2, with a place for every value.

Differences from PyYAML's safe loader: ``2e-3`` is a number; ``010`` is text, not 8; ``on``,
``yes`` and dates are text; a key that is given twice is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str, ...]
"""Keys from the top to a value."""

_MAP_TAG = "tag:yaml.org,2002:map"
_SEQUENCE_TAG = "tag:yaml.org,2002:seq"
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes whatever this loader or one for YAML 1.1 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), [*_first])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


@dataclass(slots=True)
class Document:
    """What a text says, as far as it can be read.

    Attributes:
        data: of the text; None if it is empty or broken.
        lines: line number, from 1, of every key.
        problems: one line each, starting with the line number where there is one.
    """

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse(text: str) -> Document:
    """Read one YAML document; problems are returned, not raised."""
    document = Document()
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                document.data = _Reader(loader, document).value(node, ())
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        document.data = None
        document.problems.append(_explain(error, text))
    return document


def dump(data: Mapping[str, Any]) -> str:
    """Return ``data`` as YAML that :func:`parse` reads back to an equal mapping."""
    # Only ASCII: PyYAML writes some characters, such as U+0085, in a way that it reads differently.
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, default_flow_style=False)


class _Reader:
    """Turns nodes into values and notes lines and duplicate keys."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self._loader = loader
        self._document = document
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(
                problem="a value contains itself", problem_mark=node.start_mark
            )
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _MAP_TAG:
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE_TAG:
                return [self.value(item, (*path, str(i))) for i, item in enumerate(node.value)]
            return self._loader.construct_object(node, deep=True)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        first_lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.problems.append(f"{line}: a key must be a single word")
                continue
            key = self._loader.construct_object(key_node)
            if key in out:
                name = ".".join((*path, str(key)))
                self._document.problems.append(
                    f"{line}: {name} is given twice, first in line {first_lines[key]}; remove one"
                )
                continue
            key_path = (*path, str(key))
            first_lines[key] = line
            self._document.lines[key_path] = line
            out[key] = self.value(value_node, key_path)
        return out


def _explain(error: Exception, text: str) -> str:
    """Return one line: where, what, and what to do about it."""
    if isinstance(error, RecursionError):
        return "broken YAML: nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"broken YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    what = ", ".join(part for part in (error.context, error.problem) if part)
    if mark is None:
        return f"broken YAML: {what}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        what += "; indent with spaces, not tabs"
    return f"{mark.line + 1}: broken YAML: {what} (column {mark.column + 1})"
