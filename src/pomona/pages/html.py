"""Self-contained HTML pages, and the parts that they have in common.

Pictures are embedded, there are no scripts, and the content policy of a page forbids the browser to load anything.
Pages are readable on a phone, in dark mode and on paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

NONE = "\u2013"  # a cell without a number
TIMES = "\u00d7"
PERCENT = "\u00a0%"  # with a non-breaking space


def write(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page with the sections that are not empty; the title is plain text, the sections are HTML."""
    body = "\n".join(part for part in sections if part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.format(title=escape(title), style=_STYLE, body=body), encoding="utf-8")
    return path


def section(title: str, body: str) -> str:
    """A section with a heading; empty if its body is."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def table(head: Sequence[str], body: Iterable[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """A table of plain text; a heading that begins with `>` aligns its column to the right."""
    sides = [' class="right"' if name.startswith(">") else "" for name in head]

    def line(tag: str, cells: Sequence[str]) -> str:
        texts = (f"<{tag}{side}>{escape(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    parts = [f"<thead>{line('th', [name.removeprefix('>') for name in head])}</thead>", "<tbody>"]
    parts += [line("td", cells) for cells in body]
    parts.append("</tbody>")
    if foot:
        parts.append(f"<tfoot>{line('td', foot)}</tfoot>")
    return '<div class="scroll" tabindex="0"><table>\n' + "\n".join(parts) + "\n</table></div>"


def pairs(facts: dict[str, str]) -> str:
    """Names and values, one pair per line."""
    if not facts:
        return ""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return '<dl class="pairs">\n' + "\n".join(items) + "\n</dl>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<footer class="quiet">Written by Pomona.</footer>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1d1f21; --quiet: #5c6166; --paper: #ffffff; --panel: #f4f5f6; --line: #d9dcdf; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e8; --quiet: #a2a8ad; --paper: #16181a; --panel: #212427; --line: #3a3f44; --mark: #56b4e9; }
  img { filter: brightness(0.9); }
}
* { box-sizing: border-box; }
body {
  max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.6rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
p { margin: 0.25rem 0; }
.quiet, figcaption, th, dt { color: var(--quiet); }
.headline {
  margin: 1.25rem 0; padding: 0.6rem 0.9rem; border-left: 4px solid var(--mark); background: var(--panel);
  font-size: 1.2rem; font-weight: 600;
}
dl { margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem 1.5rem; }
.figures dt { font-size: 0.85rem; }
.figures dd { font-size: 1.15rem; font-weight: 600; }
.pairs { display: grid; grid-template-columns: fit-content(60%) 1fr; gap: 0.15rem 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th { font-weight: 500; vertical-align: bottom; }
tbody td { border-top: 1px solid var(--line); }
tfoot td { border-top: 2px solid var(--line); font-weight: 600; }
.right { text-align: right; }
td.right { white-space: nowrap; }
td:last-child:not(.right) { min-width: 7rem; }
@media (max-width: 40rem) { td:last-child:not(.right) { white-space: nowrap; } }
figure { margin: 0 0 2rem; max-width: 46rem; break-inside: avoid; }
img { display: block; width: 100%; height: auto; padding: 0.25rem 0; border-radius: 6px; background: #ffffff; }
figcaption { margin-top: 0.5rem; font-size: 0.9rem; }
pre { margin: 0; padding: 0.8rem 1rem; overflow-x: auto; border-radius: 6px; background: var(--panel); }
pre { font: 0.85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; font-size: 0.85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  th, td { padding-right: 0.5rem; }
  h2 { break-after: avoid; }
  tr, pre { break-inside: avoid; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; }
}
"""
