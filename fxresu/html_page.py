"""The frame of a self-contained HTML page: escaping, data for its script, colours, and no way to the network."""

from __future__ import annotations

import html
import json
from typing import Any

# `default-src 'none'`: a page that tried to load anything would show it on the console instead.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --line: #d5d9e0; --ink: #1b1f27; --quiet: #5b6472;
  --blue: #1d5fd1; --green: #17713c; --orange: #a44a00; --red: #b3202a; --purple: #7a36b8;
  --blue-soft: #e4edfc; --green-soft: #def3e5; --orange-soft: #fcebdc; --red-soft: #fbe3e4; --purple-soft: #f1e6fa;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --panel: #1c2027; --line: #373e49; --ink: #e3e7ed; --quiet: #9aa4b2;
    --blue: #83b3ff; --green: #6bd18e; --orange: #f0a768; --red: #ff8f92; --purple: #c9a0f2;
    --blue-soft: #1b2c49; --green-soft: #16331f; --orange-soft: #3b2815; --red-soft: #401f22; --purple-soft: #2f2140;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
}
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 20px 0 6px; }
code, pre, .mono { font-family: var(--mono); font-size: 12.5px; }
.quiet { color: var(--quiet); }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; color: var(--quiet); }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""
"""Colours (light and dark), type and tables that pages share, as CSS."""


def escape(text: object) -> str:
    """`text` as HTML text or a quoted attribute's value."""
    return html.escape(str(text), quote=True)


def script_data(name: str, value: Any) -> str:
    """A `<script>` element that holds JSON for the page's script: `JSON.parse(document.getElementById(name).text)`.

    Args:
        name: id of the element.
        value: what `json.dumps` takes; NaN and infinities are refused, because browsers refuse them.

    Raises:
        ValueError: NaN or an infinity.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Inside a script element only "</script" and "<!--" mean something to the HTML parser.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole document that needs no network and no other file.

    Args:
        title: plain text.
        body: HTML of the body, escaped where needed.
        style: CSS after `STYLE`.
        script: JavaScript, run after the body; must not contain `</script`.

    Raises:
        ValueError: `script` or `style` would end its element early.
    """
    for name, text, end in (("script", script, "</script"), ("style", style, "</style")):
        if end in text.lower():
            raise ValueError(f"{name}: contains {end!r}, which would end the element")
    code = f"<script>\n{script}\n</script>\n" if script else ""
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n{code}</body>\n</html>\n"
    )
