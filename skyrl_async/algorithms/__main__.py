"""Print the catalogue: ``python -m skyrl_async.algorithms [--json | --markdown]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from skyrl_async.algorithms.catalogue import Entry, entries


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every method with its equation, paper and defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m skyrl_async.algorithms", description="The catalogue of algorithms."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON list, for machines")
    form.add_argument("--markdown", action="store_true", help="one Markdown table")
    parsed = parser.parse_args(arguments)
    catalogue = list(entries())
    if parsed.json:
        print(json.dumps([as_json(entry) for entry in catalogue], indent=1))
    elif parsed.markdown:
        print(as_markdown(catalogue))
    else:
        print("\n\n".join(as_text(entry) for entry in catalogue))


def as_json(entry: Entry) -> dict[str, object]:
    """Return an entry as JSON can hold it."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "summary": entry.summary,
        "when": entry.when,
        "equation": entry.equation,
        "source": entry.source,
        "configuration": list(entry.configuration),
        "defaults": {name: show(value) for name, value in entry.options.items()},
    }


def as_markdown(catalogue: Sequence[Entry]) -> str:
    """Return all entries as a table."""
    rows = [
        "| name | kind | equation | when it helps | configuration | paper | defaults | test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in catalogue:
        options = ", ".join(f"{name} {show(value)}" for name, value in entry.options.items())
        equation = f"$`{entry.equation}`$" if entry.equation else entry.summary
        cells = (
            f"`{entry.name}`",
            entry.kind,
            equation,
            entry.when,
            "<br>".join(f"`{override}`" for override in entry.configuration) or "always",
            entry.source,
            options,
            ", ".join(f"`{name}`" for name in test_files(entry)),
        )
        rows.append("| " + " | ".join(cell.replace("|", r"\vert ") for cell in cells) + " |")
    return "\n".join(rows)


def test_files(entry: Entry) -> tuple[str, ...]:
    """Return the files below ``tests/algorithms/`` that hold an entry against its formula."""
    module = entry.function.__module__.rpartition(".")[2]
    if module == "behavior_losses":
        return ("test_policy_losses.py", "test_behavior_losses.py")
    return (f"test_{module}.py",)


def as_text(entry: Entry) -> str:
    """Return one entry for a terminal."""
    options = ", ".join(f"{name}={show(value)}" for name, value in entry.options.items())
    lines = [f"{entry.name}  ({entry.kind})", f"    {entry.summary}", f"    for: {entry.when}"]
    if entry.equation:
        lines.append(f"    {entry.equation}")
    if options:
        lines.append(f"    defaults: {options}")
    lines.append(f"    configuration: {' '.join(entry.configuration) or 'always'}")
    lines.append(f"    source: {entry.source}")
    return "\n".join(lines)


def show(value: object) -> str:
    """Return a default as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
