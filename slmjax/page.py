"""HTML from values. Every text is escaped here; what is HTML already is marked as such by its type."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5c6370; --page: #ffffff; --panel: #f5f6f8; --line: #d8dce2;
  --accent: #0060a8; --prompt: #fff3c4; --bar: #9cc5e6; --warn: #9a3b00;
  --curve-0: #0072b2; --curve-1: #d55e00; --curve-2: #009e73; --curve-3: #b0508a; --curve-4: #a87400;
  --curve-5: #5a5ad6; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --dim: #a0a7b3; --page: #16181c; --panel: #1f2228;
  --line: #393e47; --accent: #6db8f2; --prompt: #4d4318; --bar: #2d5b80; --warn: #ffb27a;
  --curve-0: #5db4f0; --curve-1: #ff9b5e; --curve-2: #4fd0a5; --curve-3: #e8a0cb; --curve-4: #f0c04a;
  --curve-5: #a9a9ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-bottom: 0.4rem; }
a { color: var(--accent); }
.dim { color: var(--dim); }
.warn { color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 1.2rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; padding: 0.6rem; background: var(--panel); border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; } dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 0.8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.45 ui-monospace, monospace; }
mark { background: var(--prompt); color: inherit; border-radius: 3px; }
.bar { display: inline-block; height: 0.7em; background: var(--bar); border-radius: 2px; }
"""


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def escape(value: Any) -> Html:
    """Returns `value` as HTML: itself if it is HTML, else its escaped text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(tag: str, *children: Any, **attributes: str) -> Html:
    """Returns <tag attributes>children</tag>; `class_` gives the attribute class."""
    given = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(escape, children))}</{tag}>")


def joined(parts: Iterable[Any]) -> Html:
    """Returns the parts one after the other."""
    return Html("\n".join(map(escape, parts)))


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html:
    """Returns a table. Numbers are shown by `number` and, like their headings, stand on the right."""
    rows = [list(row) for row in rows]
    numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(tag: str, cells: Sequence[Any]) -> Html:
        made = []
        for cell, right in zip(cells, numeric, strict=True):
            text = number(cell) if _is_number(cell) else cell
            made.append(element(tag, text, class_="number") if right else element(tag, text))
        return element("tr", *made)

    head = element("thead", line("th", header))
    return element("div", element("table", head, element("tbody", *(line("td", row) for row in rows))), class_="scroll")


def number(value: float) -> str:
    """Returns four significant digits, or a whole number with separators."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def path_name(path: Path) -> str:
    """Returns what to call a directory: a relative path as it was given, of an absolute one the last part."""
    return path.resolve().name if path.is_absolute() or path == Path() else str(path)


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Returns names and values as a list; values that are None are left out."""
    items = [element("dt", name) + element("dd", value) for name, value in pairs if value is not None]
    return element("dl", Html("".join(items)))


def folded(summary: str, content: Any) -> Html:
    """Returns `content` behind a line that opens it."""
    return element("details", element("summary", summary), content)


def bar(share: float) -> Html:
    """Returns a bar, `share` of 8 em long."""
    return element("span", class_="bar", style=f"width: {8 * min(max(share, 0.0), 1.0):.2f}em")


def document(title: str, body: Any, *, style: str = "") -> str:
    """Returns the whole page. Nothing in it is loaded from elsewhere, and no script runs, whatever a text holds."""
    head = Html(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{element('title', title)}<style>{_STYLE}{style}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{escape(body)}\n</body></html>\n'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
