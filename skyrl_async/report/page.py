"""One file of HTML with everything in it: style, script and data, and no request to anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = (
    *("dom.js", "charts.js", "timeline.js", "samples.js", "tables.js", "run.js"),
    *("sweep.js", "main.js"),
)
"""In the order in which they are joined."""


def render(content: Mapping[str, Any], *, live: bool = False) -> str:
    """Return the page that shows ``content``.

    The page forbids itself everything but its own style and script, by their digests, so that no
    text of a run can become a script; a live page may also ask its own server for news.

    Args:
        content: values of JSON, of :meth:`~.content.RunContent.read` or of a sweep.
        live: whether the page asks for news.
    """
    style = _asset("page.css")
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\n}})();\n'
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    if live:
        policy += "; connect-src 'self'"
    return _asset("page.html").format(
        live="true" if live else "false",
        policy=policy,
        title=html.escape(f"{content.get('name', 'report')}"),
        style=style,
        content=embedded(content),
        script=script,
    )


def embedded(content: Any) -> str:
    """Return JSON that can stand in a script element: no character in it can end that.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files("skyrl_async.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    hashed = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(hashed).decode()}'"
