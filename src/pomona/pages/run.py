"""One self-contained page about one run: the numbers, the pictures and everything needed to repeat it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pomona.pages.html import NONE, PERCENT, TIMES, pairs, section, table, write
from pomona.pages.pictures import Result, Row, times

_ARROW = "\u2192"
_NUM_LAST = 10  # epochs in the table of the last ones

_CAPTIONS = {
    "layers": "Each bar is the share of its weights that a layer keeps. The dashed line is the share of all layers "
    "together: a bar that ends to its right kept more than average, one that ends to its left kept less.",
    "history": "If the network had been cut at the end of an epoch, each layer would have kept this share of its "
    "weights. Where lines still move, layers are still trading weights with each other.",
    "training": "Where the two curves have met, the cut loses nothing: the weights it would remove no longer matter.",
    "magnitudes": "Colours show how many weights have each magnitude in each epoch. Weights that no gradient feeds "
    "decay and separate from the others. If the cut (the orange line) runs through the upper hump, more weights took "
    "turns in being active than may stay, and it removes some that are not small. Accuracy before and after shows "
    "the price.",
}


def write_page(rows: Sequence[Row], result: Result, pictures: Iterable[Path], path: Path) -> Path:
    """Write the page of a run to `path`, and return it.

    Args:
        rows: the parsed lines of metrics.jsonl, one per epoch.
        result: the parsed result.json. Missing or null values of both are left out or shown as a dash.
        pictures: PNG files to embed, in this order; those that `draw_all` makes have captions.
        path: where to write the page.
    """
    sections = (
        _top(rows, result),
        section("Accuracy", _accuracy(result)),
        section("Tickets", _tickets(result)),
        section("Diagnosis", _diagnosis(result)),
        section("Pictures", "\n".join(_picture(picture) for picture in pictures)),
        section("Layers", _layers(result)),
        section("Not pruned", _outside(result)),
        section("Recipe", _recipe(result)),
        section("Environment", _environment(result)),
        _last_epochs(rows),
    )
    return write(path, str(result.get("title") or "A run of Pomona"), sections)


def _top(rows: Sequence[Row], result: Result) -> str:
    lines = [f"<h1>{escape(str(result.get('title') or 'A run of Pomona'))}</h1>"]
    lines += [f'<p class="quiet">{escape(str(result[key]))}</p>' for key in ("source", "data") if result.get(key)]
    lines.append(f'<p class="headline">{escape(_headline(rows, result))}</p>')
    report = result.get("report") or {}
    figures = [
        ("sparsity", _percent(report.get("sparsity"), of=1)),
        ("largest weight cut", _number(report.get("largest_cut"))),
        ("smallest weight kept", _number(report.get("smallest_kept"))),
        ("dead channels", _count(report.get("dead_channels"))),
    ]
    shown = [f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures if value != NONE]
    if shown:
        lines += ['<dl class="figures">', *shown, "</dl>"]
    return "<header>\n" + "\n".join(lines) + "\n</header>"


def _headline(rows: Sequence[Row], result: Result) -> str:
    report, accuracy = result.get("report"), result.get("accuracy") or {}
    parts = []
    if report:
        total, kept = report["total"], report["nonzero"]
        size = f"{times(total, kept).removesuffix('x')}{TIMES} smaller" if kept else "all of them cut"
        parts.append(f"{total:,} {_ARROW} {kept:,} weights, {size}")
    if accuracy.get("after_cut") is not None:
        before, after = _percent(accuracy.get("before_cut")), _percent(accuracy["after_cut"])
        parts.append(f"{before} before the cut, {after} after")
    if not parts:
        last = next((row for row in reversed(rows) if row.get("test_accuracy") is not None), {})
        parts = ["This run has not finished", f"{len(rows)} epochs so far"]
        parts += [f"last test accuracy {_percent(last['test_accuracy'])}"] if last else []
    return "; ".join(parts)


def _accuracy(result: Result) -> str:
    accuracy, expected = result.get("accuracy") or {}, result.get("expected") or {}
    if not accuracy:
        return ""
    base, tolerance, loss = accuracy.get("base"), expected.get("tolerance"), result.get("loss") or {}
    cases = (
        ("base model", base, expected.get("base_accuracy")),
        ("trained, before the cut", accuracy.get("before_cut"), None),
        ("after the cut", accuracy.get("after_cut"), expected.get("accuracy")),
    )
    head = ["network", ">test accuracy", ">against base"]
    body = [[name, _percent(value), _difference(value, base)] for name, value, _ in cases]
    if expected:
        head += [">expected", "verdict"]
        for cells, (_, value, wanted) in zip(body, cases, strict=True):
            cells += [_percent(wanted), _verdict(value, wanted, tolerance)]
    if loss:  # runs of earlier versions have none
        head += [">test loss (nats)"]
        for cells, key in zip(body, ("base", "before_cut", "after_cut"), strict=True):
            cells += [_number(loss.get(key))]
    return table(head, body)


def _verdict(value: float | None, wanted: float | None, tolerance: float | None) -> str:
    if value is None or wanted is None:
        return NONE
    tolerance = tolerance or 0.0
    difference = value - wanted
    if abs(difference) <= tolerance + 1e-9:  # the decimals of a percentage are not exact in binary
        return f"\u2713 within {tolerance:g}"
    if difference > 0:
        return f"\u2713 {difference:.2f} above"
    return f"\u2717 {-difference:.2f} below, tolerance {tolerance:g}"


def _tickets(result: Result) -> str:
    """The initial weights with the masks that were found, trained like the base model."""
    tickets, expected = result.get("tickets") or {}, result.get("expected") or {}
    if not tickets:
        return ""
    published = {"method": expected.get("ticket_accuracy"), "magnitude": expected.get("magnitude_ticket_accuracy")}
    head = ["mask", ">weights", ">test accuracy", ">against base", ">published"]
    base = _at(result, "accuracy", "base")
    return table(
        head,
        [
            [
                f"found by {name}",
                _count(ticket.get("nonzero")),
                _percent(ticket.get("accuracy")),
                _difference(ticket.get("accuracy"), base),
                _percent(published.get(name)),
            ]
            for name, ticket in tickets.items()
        ],
    )


def _diagnosis(result: Result) -> str:
    diagnosis = result.get("diagnosis") or {}
    if not diagnosis:
        return ""
    return f"<p>{escape(str(diagnosis.get('message') or ''))}</p>"


def _layers(result: Result) -> str:
    report = result.get("report") or {}
    if not report.get("layers"):
        return ""
    head = ["layer", ">shape", ">total", ">kept", ">density", ">compression", ">dead channels"]
    head += [">largest cut", "why this share"]
    body = [
        [
            str(layer.get("name", "?")),
            TIMES.join(str(size) for size in layer.get("shape") or []),
            _count(layer.get("total")),
            _count(layer.get("nonzero")),
            _share(layer.get("density")),
            _compression(layer),
            f"{layer['dead_channels']:,} of {layer['channels']:,}" if layer.get("channels") else NONE,
            _number(layer.get("largest_cut")),
            str(layer.get("reason") or NONE),
        ]
        for layer in report["layers"]
    ]
    whole = [
        "all",
        "",
        _count(report.get("total")),
        _count(report.get("nonzero")),
        _share(report.get("density")),
        _compression(report),
        _count(report.get("dead_channels")),
        _number(report.get("largest_cut")),
        "",
    ]
    of = f'<p class="quiet">Numbers of {escape(str(report["of"]))}.</p>\n' if report.get("of") else ""
    return of + table(head, body, foot=whole)


def _outside(result: Result) -> str:
    outside = _at(result, "report", "outside")
    if not outside:
        return ""
    if isinstance(outside, dict):  # name -> reason, as Report.to_dict has it
        return table(["tensor", "why"], [[name, str(reason)] for name, reason in outside.items()])
    body = [[str(t.get("name", "?")), _count(t.get("total")), str(t.get("reason") or NONE)] for t in outside]
    return table(["tensor", ">numbers", "why"], body)


def _picture(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    caption = escape(_CAPTIONS.get(picture.stem, ""))
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.stem)}">'
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


def _recipe(result: Result) -> str:
    recipe = result.get("recipe")
    return f"<pre>{escape(_toml(recipe).strip())}</pre>" if recipe else ""


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    """The recipe as in its file: JSON writes plain values as TOML does."""
    plain = [f"{_key(key)} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, dict)]
    nested = [
        f"\n[{prefix}{_key(key)}]\n{_toml(value, f'{prefix}{_key(key)}.')}"
        for key, value in table.items()
        if isinstance(value, dict)
    ]
    return "".join(plain + nested)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _environment(result: Result) -> str:
    seconds = result.get("seconds")
    facts = {key: result.get(key) for key in ("seed", "pomona", "torch", "threads", "device", "commit")}
    known = {key: str(value) for key, value in facts.items() if value is not None}
    return pairs(known | ({"duration": _in_words(seconds)} if seconds is not None else {}))


def _last_epochs(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    head = ["stage", ">epoch", ">step", ">learning rate", ">loss", ">train", ">test", ">if cut"]
    head += [">test loss", ">loss if cut", ">active", ">decay exponent", ">largest cut", ">seconds"]
    body = [
        [
            str(row.get("stage") or NONE),
            _count(row.get("epoch")),
            _count(row.get("step")),
            _number(row.get("lr")),
            _number(row.get("loss")),
            _percent(row.get("train_accuracy")),
            _percent(row.get("test_accuracy")),
            _percent(row.get("accuracy_if_cut")),
            _number(row.get("test_loss")),
            _number(row.get("loss_if_cut")),
            _count(row.get("active")),
            _number(row.get("decay_exponent")),
            _number(row.get("largest_cut")),
            _number(row.get("seconds")),
        ]
        for row in rows[-_NUM_LAST:]
    ]
    return f"<details>\n<summary>The last {len(body)} epochs</summary>\n{table(head, body)}\n</details>"


def _at(tree: Any, *keys: str) -> Any:
    """The value under a path of keys; None if any of them is missing or null."""
    for key in keys:
        tree = (tree or {}).get(key)
    return tree


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _percent(value: float | None, of: float = 100) -> str:
    return NONE if value is None else f"{100 * value / of:.2f}{PERCENT}"


def _share(density: float | None) -> str:
    """A density in percent with three digits, because layers differ by orders of magnitude."""
    return NONE if density is None else f"{100 * density:.3g}{PERCENT}"


def _compression(of: dict[str, Any]) -> str:
    total, kept = of.get("total"), of.get("nonzero")
    return NONE if total is None or kept is None else times(total, kept)


def _difference(value: float | None, base: float | None) -> str:
    return NONE if value is None or base is None else f"{value - base:+.2f}"


def _in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
