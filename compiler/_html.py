"""A plain HTML page in Python strings: titles, rows and figures in, one self-contained page out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

ABSENT = "–"

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#667085;--line:#e3e7ee;--page:#fff;
--card:#f6f8fb;--bar:#3b6fd4;--good:#16794c;--bad:#b42318;--c0:#3b6fd4;--c1:#c2571a;--c2:#16794c;
--c3:#8b3fb5;--c4:#a8821c;--c5:#5d6b82}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3442;--page:#12161d;
--card:#1a202a;--bar:#6f9bea;--good:#4cc38a;--bad:#ff8a80;--c0:#6f9bea;--c1:#f0954f;--c2:#4cc38a;
--c3:#c58be8;--c4:#e0bc5a;--c5:#9aa7bd}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:68rem;
margin:2rem auto;padding:0 1.2rem}
h1,h2,p,li,code{overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
.verdict{display:inline-block;margin:.8rem 0 0;padding:.2rem .8rem;border-radius:1rem;
border:1px solid currentColor}
summary{cursor:pointer;color:var(--soft);margin:.6rem 0}
p.sub,small{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;
margin:1.4rem 0}
.card{background:var(--card);border-radius:.6rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.45rem}.card span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.87rem}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.passed{color:var(--good);font-weight:600}.failed{color:var(--bad);font-weight:600}
.track{width:6rem;padding-top:.35rem}.bar{background:var(--bar);height:.6rem;border-radius:.3rem;min-width:2px}
pre{background:var(--card);padding:.8rem 1rem;border-radius:.6rem;overflow-x:auto}
svg{display:block;width:100%;min-width:20rem;max-width:40rem}
svg text{fill:var(--ink);font-size:11px}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.2rem 0;font-size:.85rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.4rem}
img{max-width:100%;image-rendering:pixelated;border-radius:.4rem}
@media(max-width:30rem){body{margin:1rem auto;padding:0 .8rem}.card b{font-size:1.2rem}
.cards{grid-template-columns:1fr 1fr}th,td{padding:.3rem .4rem}}
"""


class Markup(str):
    """HTML that is not escaped again."""

    __slots__ = ()


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page; it loads nothing from elsewhere."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a heading and its body, or nothing where there is no body."""
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def bullets(points: Iterable[str]) -> str:
    """Return a list, or nothing where there are no points."""
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return f"<ul>{items}</ul>" if items else ""


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = [[name.replace("_", " "), plain(value)] for name, value in values.items()]
    return table(("", ""), rows) if rows else ""


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[int] = ()
) -> str:
    """Return a table; the columns `numeric` are aligned right, `Markup` is left as it is."""

    def cell(tag: str, index: int, value: object) -> str:
        text = value if isinstance(value, Markup) else escape(plain(value))
        text = "" if tag == "th" and value == "" else text  # no name, not an absent figure
        return f"<{tag}{' class=n' if index in numeric else ''}>{text}</{tag}>"

    def row(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, i, v) for i, v in enumerate(values)) + "</tr>"

    head = row("th", header) if any(header) else ""
    return f'<div class="scroll"><table>{head}{"".join(row("td", r) for r in rows)}</table></div>'


def plain(value: object) -> str:
    """Return a value as people write it."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def folded(summary: str, body: str) -> str:
    """Return a body that is shown on demand, or nothing where there is none."""
    if not body:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def lookup(values: Mapping[str, Any], *path: str) -> Any:
    """Return what is at a path of names, or None."""
    current: Any = values
    for name in path:
        current = current.get(name) if isinstance(current, Mapping) else None
    return current


def number(value: object, digits: int = 2) -> str:
    """Return a figure with so many digits; counts and words as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ABSENT if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def with_unit(value: float | None, unit: str) -> str:
    """Return a figure and its unit."""
    return ABSENT if value is None else f"{number(value)} {unit}"


def size_ratio(manifest: Mapping[str, Any], above: str, below: str) -> str:
    """Return how many times larger one size of the manifest is than another."""
    size = manifest.get("size", {})
    if not size.get(above) or not size.get(below):
        return ABSENT
    return f"{size[above] / size[below]:.2f}×"
