"""The results of `pomona bench` as one self-contained page: tables, and bars drawn in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pomona.benchmark.result import BenchResult, facts, layer_rows, path_rows, with_unit
from pomona.pages.html import pairs, section, table, write

_WIDTH, _LABEL, _NUMBER = 720, 170, 80  # widths of the picture, of the names on its left, of the numbers on its right
_ROW = 22
_MOST_LAYERS = 30  # at most so many in the picture


@dataclass(frozen=True, slots=True)
class _Bar:
    name: str
    seconds: float
    kind: str  # class of the style below


def write_bench_page(result: BenchResult, path: Path) -> Path:
    """Write the page, and return its path."""
    headline = "; ".join(result.verdict())
    sizes = ", ".join("\u00d7".join(map(str, shape)) for shape in result.inputs)
    sections = (
        f"<style>{_STYLE}</style>",
        f'<header>\n<h1>{escape(result.model)}</h1>\n<p class="quiet">input {sizes}</p>\n'
        f'<p class="headline">{escape(headline)}</p>\n</header>',
        section("Time of one batch", _bars(_path_bars(result)) + _CAPTION + _table(path_rows(result))),
        section("Layers", _layers(result)),
        section("Network and machine", pairs(facts(result))),
    )
    return write(path, f"{result.model}, benchmarked", sections)


def _path_bars(result: BenchResult) -> list[_Bar]:
    bars = []
    for path in result.paths:
        if path.timing and not path.is_wrong:
            kind = "mine" if path.is_mine else "int8" if path.is_int8 else "dense"
            bars.append(_Bar(path.name, path.timing.median, kind))
    return bars


def _layers(result: BenchResult) -> str:
    timed = [layer for layer in result.layers if layer.seconds is not None and layer.dense_seconds is not None]
    shown = sorted(timed, key=lambda layer: -(layer.seconds or 0.0))[:_MOST_LAYERS]
    bars = []
    for layer in (layer for layer in timed if layer in shown):
        bars += [_Bar(layer.name, layer.seconds or 0.0, "mine"), _Bar("", layer.dense_seconds or 0.0, "dense")]
    note = (
        f'<p class="quiet">The {len(shown)} longest of {len(timed)} are drawn.</p>' if len(shown) < len(timed) else ""
    )
    return _bars(bars) + (_LAYER_CAPTION if bars else "") + note + _table(layer_rows(result))


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table(rows[0], rows[1:])


def _bars(bars: Sequence[_Bar]) -> str:
    """Horizontal bars from zero, all to the same scale."""
    if not bars:
        return ""
    longest = max(bar.seconds for bar in bars) or 1.0
    room = _WIDTH - _LABEL - _NUMBER
    lines = []
    for i, bar in enumerate(bars):
        y, width = i * _ROW, max(room * bar.seconds / longest, 1.0)
        middle = y + _ROW / 2 + 4
        name = bar.name if len(bar.name) <= 24 else "\u2026" + bar.name[-23:]
        lines.append(f'<text x="{_LABEL - 8}" y="{middle:g}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<rect class="{bar.kind}" x="{_LABEL}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}"/>')
        lines.append(f'<text x="{_LABEL + width + 6:.1f}" y="{middle:g}">{with_unit(bar.seconds)}</text>')
    size = f'viewBox="0 0 {_WIDTH} {len(bars) * _ROW}"'
    return (
        f'<svg class="bars" {size} role="img" aria-label="bars of the times below">\n' + "\n".join(lines) + "\n</svg>"
    )


_CAPTION = (
    '<p class="quiet">Medians of one batch, wall time; shorter is better. Blue is Pomona, grey computes in float32 '
    "and ignores zeros, orange computes in 8-bit integers. Each path ran in its own process, in turn with others.</p>"
)
_LAYER_CAPTION = (
    '<p class="quiet">Blue: the layer in Pomona\'s engine as it runs; grey below: the same engine with all zeros '
    "computed. Operations that are fused into a layer count for that layer.</p>"
)
_STYLE = """
.bars { display: block; width: 100%; max-width: 46rem; height: auto; margin: 0 0 0.75rem; font-size: 13px; }
.bars text { fill: var(--ink); }
.bars .mine { fill: var(--mark); }
.bars .dense { fill: var(--quiet); }
.bars .int8 { fill: #d55e00; }
.scroll { margin-top: 0.75rem; }
"""
