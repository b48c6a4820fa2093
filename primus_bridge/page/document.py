"""One HTML file that needs nothing else: its frame, its policy, and its data as JSON beside its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from primus_bridge import __version__
from primus_bridge.page.visible import one_line

BASE = "primus_bridge.page"


def document(
    package: str,
    body: str,
    data: Any,
    *,
    command: str,
    title: str,
    heading: str,
    lead: str,
    skip: tuple[str, str],
    root: Mapping[str, str] | None = None,
) -> str:
    """The whole file.

    package: where page.css and page.js lie, which come after the common ones. body: HTML, below the heading; data: what
    the script reads from the element ``data``. command, title, heading, lead: text. skip: id and name of the part that
    the first link of the page leads to. root: attributes of <html>.
    """
    style = asset(BASE, "base.css") + asset(package, "page.css")
    script = asset(BASE, "base.js") + asset(package, "page.js")
    # only this script runs; the data is text for a browser, even if escaping it should have failed
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in (root or {}).items())
    return f"""<!DOCTYPE html>
<html lang="en"{attributes}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="primus-bridge {__version__}">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#{skip[0]}">Skip to {escape(skip[1])}</a>
<div class="wrap">
<header class="top">
<div>
<p class="kicker">{text(command)}</p>
<h1>{text(heading)}</h1>
<p class="lead">{text(lead)}</p>
</div>
<button id="theme" class="button" type="button">Light / dark</button>
</header>
<main>
{body}
</main>
</div>
<script type="application/json" id="data">{safe_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def asset(package: str, name: str) -> str:
    """A text file of an installed package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def text(value: Any) -> str:
    """Text of unknown origin as HTML: one line, nothing in it hidden, nothing in it markup."""
    return escape(one_line(str(value)))


def safe_json(data: Any) -> str:
    """JSON that no text in it can break out of a <script>. Raises ValueError for NaN and infinity, which JSON lacks."""
    plain = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def facts(rows: Mapping[str, str]) -> str:
    """The tiles at the top of a page: name and value, both text."""
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows.items())
    return f'<dl class="facts" aria-label="Summary">{cells}</dl>'


def switch(name: str, title: str, choices: Mapping[str, str], chosen: str | None = None) -> str:
    """Radio buttons as one bar: value -> text; ``chosen``: the value at first, else the first one."""
    first = chosen or next(iter(choices))
    options = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if value == first else ""} '
        f'autocomplete="off"><span>{shown}</span></label>'
        for value, shown in choices.items()
    )
    return f'<fieldset><legend>{title}</legend><div class="switch">{options}</div></fieldset>'
