"""The layers of a configuration: files with their bases, presets, overrides; the last one wins."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_async.config_keys import (
    FREE_KEYS,
    KEYS,
    SECTIONS,
    default_of,
    is_text,
    keys_of,
    show,
    suggest,
)
from skyrl_async.config_yaml import KeyPath, parse

COMMAND_LINE = "command line"
PRESETS = Path(__file__).parent / "algorithms" / "presets"
"""Algorithms by name: YAML like any other, for ``algorithm: NAME``."""
_MAX_SHOWN_CHARS = 80


@dataclass(slots=True)
class Layers:
    """The values so far, where each came from, and what was wrong on the way.

    Attributes:
        values: nested as in the configuration; known keys only.
        origins: dotted path -> ``file:line`` or ``command line``.
        covered: dotted path -> value and origin before a preset set it.
        problems: one line each.
        doubtful: dotted paths that were meant to be set, but could not be.
        unreadable: a file is missing or broken, so values may be missing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    covered: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    unreadable: bool = False

    def read(self, file: Path, *, chain: tuple[Path, ...] = (), origin: str = "") -> None:
        """Add the bases of a file, then the file."""
        try:
            resolved = file.resolve()
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            self._refuse_file(_explain_unreadable(file, error, origin=origin))
            return
        if resolved in chain:
            names = " -> ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
            self._refuse_file(f"base{origin}: {names} is a cycle; remove one of these bases")
            return
        document = parse(text)
        self.problems += [
            f"{file}:{p}" if p[0].isdigit() else f"{file}: {p}" for p in document.problems
        ]
        self.unreadable |= bool(document.problems)
        data = {} if document.data is None else document.data
        if not isinstance(data, dict):
            self._refuse_file(
                f"{file}: must hold a mapping of keys to values, such as 'seed: 1', but holds "
                f"{quote(data)}"
            )
            return
        lines = {path: f"{file}:{line}" for path, line in document.lines.items()}
        for base in self._bases(data.pop("base", None), lines.get(("base",), str(file))):
            self.read(file.parent / base, chain=(*chain, resolved), origin=f" ({lines[('base',)]})")
        self._merge(data, lines)

    def _bases(self, value: Any, origin: str) -> list[str]:
        bases = [] if value is None else value if isinstance(value, list) else [value]
        if all(isinstance(base, str) and base for base in bases):
            return bases
        self._refuse_file(f"base={quote(value)} ({origin}): must be a path or a list of paths")
        return []

    def _refuse_file(self, problem: str) -> None:
        self.problems.append(problem)
        self.unreadable = True

    def _merge(self, data: Mapping[Any, Any], lines: Mapping[KeyPath, str]) -> None:
        for name, value in data.items():
            origin = lines[(str(name),)]
            if name not in SECTIONS:
                self.set((str(name),), value, origin)
            elif isinstance(value, dict):
                for key, inner in value.items():
                    self.set((name, str(key)), inner, lines[(name, str(key))])
            elif value is not None:  # a section whose keys are all commented out is fine
                self.set((name,), value, origin)

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set one value; an unknown key becomes a problem."""
        dotted = ".".join(path)
        if dotted == "algorithm" and isinstance(value, str):
            self._read_preset(value, origin)
        elif dotted in SECTIONS:
            if not isinstance(value, dict):
                example = f"{dotted}.{keys_of(dotted)[0]}"
                self.doubtful.update(k for k in KEYS if k.startswith(f"{dotted}."))
                self.problems.append(
                    f"{dotted}={quote(value)} ({origin}): {dotted} is a section; set its keys, "
                    f"for example {example}={show(default_of(KEYS[example]))}"
                )
                return
            for key, inner in value.items():
                self.set((dotted, str(key)), inner, origin)
        elif dotted in KEYS and not any("." in part for part in path):
            before = self.origins.get(dotted)
            if _is_preset(origin) and before is not None and not _is_preset(before):
                self.covered[dotted] = (_lookup(self.values, path), before)
            if dotted == "algorithm.loss" and not _is_preset(origin):
                self._forget_options_of_another_loss(value)
            for inside in [key for key in self.origins if key.startswith(f"{dotted}.")]:
                del self.origins[inside]
            self.origins[dotted] = origin
            _assign(self.values, path, value)
        elif all(path) and (free := [k for k in FREE_KEYS if dotted.startswith(f"{k}.")]):
            self.origins.setdefault(free[0], origin)
            self.origins[dotted] = origin
            _assign(self.values, path, value)
        else:
            self.doubtful.update(suggest(dotted))
            self.problems.append(f"{dotted}={quote(value)} ({origin}): {_explain_unknown(path)}")

    def _read_preset(self, name: str, origin: str) -> None:
        """Add the file of an algorithm preset, in place of an earlier one."""
        presets = {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
        if name in presets:
            self._take_back_preset()
            self.read(presets[name], origin=f" ({origin})")
            return
        close = difflib.get_close_matches(name.lower(), presets, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(presets)}"
        self.doubtful.update(k for k in KEYS if k.startswith("algorithm."))
        self.problems.append(f"algorithm={quote(name)} ({origin}): no such preset; {hint}")

    def _forget_options_of_another_loss(self, loss: Any) -> None:
        """Take back a preset's options of the loss that is now replaced."""
        options = "algorithm.loss_options"
        replaced = self.values.get("algorithm", {}).get("loss") != loss
        if replaced and _is_preset(self.origins.get(options, "")):
            self._take_back(options)

    def _take_back_preset(self) -> None:
        """Give every value that a preset has set, and nothing since, what it was before."""
        for dotted in [d for d, origin in self.origins.items() if _is_preset(origin)]:
            self._take_back(dotted)

    def _take_back(self, dotted: str) -> None:
        inside = {
            path: _lookup(self.values, path)
            for path in (tuple(key.split(".")) for key in self.origins)
            if ".".join(path).startswith(f"{dotted}.")
        }
        remove(self.values, dotted)
        del self.origins[dotted]
        if dotted in self.covered:
            value, self.origins[dotted] = self.covered.pop(dotted)
            _assign(self.values, tuple(dotted.split(".")), value)
        for path, value in inside.items():
            _assign(self.values, path, value)

    def apply(self, overrides: Sequence[str]) -> None:
        """Apply overrides in their order."""
        for key, text in self._split(overrides):
            path = tuple(part.strip() for part in key.split("."))
            dotted = ".".join(path)
            if dotted == "base":
                self.problems.append(
                    f"base={text} ({COMMAND_LINE}): only files have bases; use --config {text}"
                )
                continue
            document = parse(text)
            value = document.data
            if dotted in KEYS and is_text(KEYS[dotted]):
                # A name such as 2024 needs no quotes on the command line.
                value = value if isinstance(value, str | None) and not document.problems else text
            elif document.problems:
                self.doubtful.add(dotted)
                reason = re.sub(r"^\d+: ", "", document.problems[0])
                self.problems.append(f"{dotted}={quote(text)} ({COMMAND_LINE}): {reason}")
                continue
            self.set(path, value, COMMAND_LINE)

    def _split(self, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield the keys and the texts of their values."""
        rest = list(reversed(overrides))
        while rest:
            argument = rest.pop()
            key, equals, text = argument.removeprefix("--").partition("=")
            if equals and key.strip():
                yield key.strip(), text
            elif not argument.startswith("--") or equals:
                self.problems.append(f"{argument} ({COMMAND_LINE}): {_explain_argument(argument)}")
            elif rest and not rest[-1].startswith("--"):
                yield key.strip(), rest.pop()
            else:
                self.doubtful.add(key)
                self.problems.append(
                    f"{argument} ({COMMAND_LINE}): has no value; write {argument}=VALUE"
                )


def _explain_unknown(path: KeyPath) -> str:
    dotted = ".".join(path)
    parents = [p for p in prefixes(path[:-1]) if p in KEYS]
    if parents:
        return f"unknown key; {parents[0]} is a value, not a section: set {parents[0]} itself"
    if dotted in KEYS:
        section, _, key = dotted.rpartition(".")
        return f"keys of a file are nested; write {{{section}: {{{key}: ...}}}}"
    close = suggest(dotted)
    if close:
        kind = "section" if close[0] in SECTIONS else "key"
        return f"unknown {kind}; did you mean {' or '.join(close)}?"
    section = ".".join(path[:-1])
    if section in SECTIONS:
        return f"unknown key; {section} has {', '.join(keys_of(section))}"
    return f"unknown key; at the top are {', '.join(keys_of(''))}"


def _explain_argument(argument: str) -> str:
    if argument.endswith((".yaml", ".yml")):
        return f"not of the form key=value; for a file write --config {argument}"
    close = suggest(argument.lstrip("-"))
    key = close[0] if close else "staleness.max"
    example = show(default_of(KEYS[key])) if key in KEYS else "..."
    return f"not of the form key=value; write for example {key}={example}"


def _explain_unreadable(file: Path, error: Exception, *, origin: str) -> str:
    where = f"{file}{origin}"
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: not UTF-8 text (byte {error.start}); is it a YAML file?"
    if isinstance(error, IsADirectoryError):
        return f"{where}: is a folder; name a YAML file in it"
    if not isinstance(error, FileNotFoundError):
        return f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}"
    if not file.parent.is_dir():
        return f"{where}: no such file, and no folder {file.parent}"
    there = {p.stem: p for p in sorted(file.parent.iterdir()) if p.suffix in (".yaml", ".yml")}
    close = difflib.get_close_matches(file.stem, there, n=1)
    if close:
        return f"{where}: no such file; did you mean {there[close[0]]}?"
    names = ", ".join(p.name for p in there.values())
    found = f"YAML files there: {names}" if names else "no YAML file is there"
    return f"{where}: no such file; {found}"


def prefixes(path: Sequence[Any]) -> Iterator[str]:
    """Yield the dotted prefixes of a path, longest first."""
    for length in range(len(path), 0, -1):
        yield ".".join(map(str, path[:length]))


def _assign(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set a value in nested mappings; what is no mapping on the way becomes one."""
    for part in path[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[path[-1]] = value


def _is_preset(origin: str) -> bool:
    return origin.startswith(f"{PRESETS}{os.sep}")


def _lookup(values: dict[str, Any], path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def remove(values: dict[str, Any], dotted: str) -> None:
    """Take a value out of nested mappings."""
    *sections, key = dotted.split(".")
    for part in sections:
        values = values[part]
    del values[key]


def quote(value: Any) -> str:
    """Return a value as a message shows it: text in quotes, and not too long."""
    text = repr(value) if isinstance(value, str) else show(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
