"""Reading a policy's reply."""

from __future__ import annotations

import re

_INTEGER = re.compile(r"-?[0-9]+")
MAX_DIGITS = 18
"""A number with more digits counts as no number."""


def first_integer(reply: str) -> int | None:
    """Return the first integer written in ``reply``, or None.

    ``"I say 7, not 8"`` gives 7, ``"3.9"`` gives 3, ``"-2"`` gives -2.
    """
    found = _INTEGER.search(reply)
    if found is None or found.end() - found.start() > MAX_DIGITS:
        return None
    return int(found.group())
