"""Four pictures of one run: where the kept weights are and were, how accuracies meet, how magnitudes separate.

`rows` are the parsed lines of a run's metrics.jsonl, one per epoch; `result` is its result.json. A key may be
missing or null in both, as it is in a run that has not finished: each function draws what exists, and returns
None, leaving no file, where nothing does.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import accumulate, cycle, pairwise, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

# From the palette of Okabe and Ito, whose colours stay apart in every common form of colour blindness.
BLUE, VERMILLION, GREY, FAINT, INK = "#0072B2", "#D55E00", "#8a8a8a", "#e4e4e4", "#222222"
_PALE = "#c8c8c8"
_COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_WIDTH, _DPI = 7.0, 200  # inches and dots per inch: 1400 px, of which a phone still shows the letters
_MOST_NAMED = 8  # layers in the legend of their history
_LEAST_ERROR = 0.01  # percent; 100 % accuracy has no logarithm


def draw_all(rows: Sequence[Row], result: Result, folder: Path) -> list[Path]:
    """Draw layers.png, history.png, training.png and magnitudes.png into `folder`; returns those that have data."""
    caption = caption_of(result)
    drawn = (
        draw_layers(result, folder / "layers.png"),
        draw_history(rows, folder / "history.png", caption=caption),
        draw_training(rows, folder / "training.png", caption=caption),
        draw_magnitudes(rows, folder / "magnitudes.png", caption=caption),
    )
    return [path for path in drawn if path is not None]


def draw_layers(result: Result, path: Path) -> Path | None:
    """Draw the share of its weights that each layer keeps, on a logarithmic axis if the shares are far apart."""
    report = result.get("report") or {}
    layers = [layer for layer in report.get("layers") or [] if layer.get("total")]
    if not layers:
        return None
    totals = [layer["total"] for layer in layers]
    kept = [layer["nonzero"] for layer in layers]
    shares = [100 * k / n for k, n in zip(kept, totals, strict=True)]
    overall = 100 * sum(kept) / sum(totals)
    positive = [share for share in shares if share > 0] or [100.0]
    is_log = max(positive) > 10 * min(positive)
    left = 10 ** math.floor(math.log10(0.8 * min(positive))) if is_log else 0.0
    right = 100.0 if is_log else min(100.0, 1.08 * max(positive))

    pitch = 0.34 if len(layers) <= 40 else 0.22  # inches per layer
    size = 9 if len(layers) <= 40 else 7
    figure = new_figure(1.6 + pitch * len(layers), "Share of the weights that each layer keeps", caption_of(result))
    ax = figure.add_subplot()
    places = range(len(layers))
    ax.barh(places, right - left, left=left, height=0.7, color="#f2f2f2")
    ax.barh(places, [max(s - left, 0.0) for s in shares], left=left, height=0.7, color=BLUE)
    ax.axvline(overall, color=VERMILLION, linestyle="--", linewidth=1.2)
    label = f"all layers: {overall:.3g} %, {times(sum(totals), sum(kept))}"
    note(ax, label, (overall, 1), (0, 7), coords=("data", "axes fraction"), colour=VERMILLION, size=size)
    for place, n, k in zip(places, totals, kept, strict=True):
        for text, side, shift in ((times(n, k), "right", 44), (f"{k:,} of {n:,}", "left", 54)):
            coords = ("axes fraction", "data")
            note(ax, text, (1, place), (shift, 0), coords=coords, side=side, size=size)
    if is_log:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda share, _: f"{share:g}")
    ax.set_xlim(left, right)
    ax.set_ylim(len(layers) - 0.4, -0.6)
    names = [_shortened(str(layer.get("name", "?"))) for layer in layers]
    ax.set_yticks(places, names, parse_math=False)
    ax.set_xlabel("weights kept (% of the layer" + (", logarithmic)" if is_log else ")"))
    quiet_axes(ax)
    ax.tick_params(axis="y", length=0, labelsize=size)
    return _save(figure, path)


def draw_history(rows: Sequence[Row], path: Path, *, caption: str = "") -> Path | None:
    """Draw for each layer the share of its weights that a cut would have kept in each epoch of pruning.

    Of many layers the four that end densest and the four that end sparsest have a colour and a name.
    """
    seen = [row for row in rows if row.get("stage") == "prune" and row.get("density_if_cut")]
    if len(seen) < 2:
        return None
    curves = {name: [100 * row["density_if_cut"].get(name, math.nan) for row in seen] for name in _layers_of(seen)}
    by_end = sorted(curves, key=lambda name: -curves[name][-1])
    named = by_end if len(by_end) <= _MOST_NAMED else [*by_end[: _MOST_NAMED // 2], *by_end[-_MOST_NAMED // 2 :]]
    positive = [share for curve in curves.values() for share in curve if share > 0] or [100.0]
    is_log = max(positive) > 10 * min(positive)
    lowest = 10 ** math.floor(math.log10(0.8 * min(positive))) if is_log else 0.0  # 0 has no logarithm

    figure = new_figure(4.4 + 0.1 * len(named), "What a cut would have kept of each layer", caption)
    ax = figure.add_subplot()
    epochs = [row["epoch"] for row in seen]
    for name in [*(name for name in by_end if name not in named), *named]:
        shares = [max(share, lowest) for share in curves[name]]
        if name not in named:
            ax.plot(epochs, shares, color=_PALE, linewidth=1)
            continue
        colour, dash = _COLOURS[named.index(name) % len(_COLOURS)], "--" if named.index(name) >= len(_COLOURS) else "-"
        label = f"{_shortened(name)} (last {curves[name][-1]:.3g} %)".replace("$", r"\$")
        ax.plot(epochs, shares, color=colour, linewidth=1.6, linestyle=dash, label=label)
    if is_log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda share, _: f"{share:g}")
    ax.set_ylim(lowest, 110 if is_log else None)
    ax.set_xlim(epochs[0], epochs[-1])
    ax.set_xlabel("epoch of pruning")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.set_ylabel("weights kept (% of the layer" + (", logarithmic)" if is_log else ")"))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5, borderaxespad=0)
    quiet_axes(ax)
    return _save(figure, path)


def draw_training(rows: Sequence[Row], path: Path, *, caption: str = "") -> Path | None:
    """Draw the accuracy of the network and of the network if it were cut now; they meet where pruning succeeds.

    Below them, whichever of learning rate, decay exponent and active weights changes during the run.
    """
    epochs = _epochs(rows)
    curves = [
        ("as it is", BLUE, _series(rows, epochs, "test_accuracy")),
        ("if cut to its budget now", VERMILLION, _series(rows, epochs, "accuracy_if_cut")),
    ]
    panels = [
        ("learning\nrate", "log", _series(rows, epochs, "lr")),
        ("decay\nexponent", "linear", _series(rows, epochs, "decay_exponent")),
        ("active\nweights", "linear", _series(rows, epochs, "active")),
    ]
    curves = [curve for curve in curves if curve[2][0]]
    panels = [panel for panel in panels if len(set(panel[2][1])) > 1]
    heights = [3.4] * bool(curves) + [0.95] * len(panels)
    if not heights:
        return None

    title = "Accuracy of the network, and what a cut would leave of it" if curves else "Course of the run"
    figure = new_figure(1.3 + sum(heights), title, caption)
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if curves:
        _draw_accuracies(axes[0], curves)
    for ax, (name, scale, (x, y)) in zip(axes[bool(curves) :], panels, strict=True):
        ax.plot(x, y, color=INK, linewidth=1.4, drawstyle="steps-mid" if scale == "log" else "default")
        ax.set_yscale(scale if min(y) > 0 else "linear")
        ax.set_ylabel(name)
        if scale == "linear":
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            ax.locator_params(axis="y", nbins=3)
    for ax in axes:
        quiet_axes(ax)
    _mark_stages(axes, rows)
    axes[-1].set_xlabel("epoch")
    axes[-1].set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.align_ylabels(axes)
    return _save(figure, path)


def draw_comparison(entries: Sequence[Result], path: Path, *, caption: str = "") -> Path:
    """Draw accuracy over compression for each method: the mean over seeds, with one standard deviation."""
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    figure = new_figure(5.2, "Accuracy at equal cost", caption)
    ax = figure.add_subplot()
    for name, (marker, colour) in zip(names, cycle(product("osD", _COLOURS)), strict=False):
        points = []
        for asked in sorted({entry["asked"] for entry in entries if entry["name"] == name}):
            found = [e["accuracy"] for e in entries if e["name"] == name and e["asked"] == asked]
            points.append((asked, mean(found), stdev(found) if len(found) > 1 else 0.0))
        x, y, error = zip(*points, strict=True)
        ax.errorbar(x, y, yerr=error, color=colour, marker=marker, markersize=4, linewidth=1.4, capsize=2, label=name)
    ax.set_xscale("log")
    ax.set_xticks(sorted({entry["asked"] for entry in entries}))
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    _scale_by_error(ax, [entry["accuracy"] for entry in entries])
    ax.set_xlabel("compression: weights over non-zero weights (logarithmic)")
    ax.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower left")
    quiet_axes(ax)
    return _save(figure, path)


def draw_magnitudes(rows: Sequence[Row], path: Path, *, caption: str = "") -> Path | None:
    """Draw how the histogram of log10 |w| separates into two humps during pruning, and the cut between them."""
    from matplotlib.colors import LogNorm

    rows = [row for row in rows if row.get("stage") == "prune"]
    seen = [row for row in rows if any((row.get("histogram") or {}).get("counts") or [])]
    if not seen:
        return None
    bins = [
        (low, high, count)
        for row in seen
        for (low, high), count in zip(pairwise(row["histogram"]["edges"]), row["histogram"]["counts"], strict=True)
        if count > 0
    ]
    most = max(10, *(count for _, _, count in bins))
    cuts = [(row["epoch"], math.log10(row["largest_cut"])) for row in rows if (row.get("largest_cut") or 0) > 0]

    figure = new_figure(4.9, "Magnitudes of the weights during pruning", caption)
    heat, outline = figure.subplots(1, 2, sharey=True, width_ratios=[2.3, 1])
    norm = LogNorm(1, most)
    borders = _borders([row["epoch"] for row in seen])
    for column, row in zip(pairwise(borders), seen, strict=True):
        counts = [[count or math.nan] for count in row["histogram"]["counts"]]
        mesh = heat.pcolormesh(column, row["histogram"]["edges"], counts, norm=norm, cmap="YlGnBu")
    if cuts:
        mark = "o" if len(cuts) == 1 else ""
        label = "largest |w| that a cut now would remove"
        heat.plot(*zip(*cuts, strict=True), color=VERMILLION, linewidth=2, marker=mark, label=label)
    heat.set_xlim(borders[0], borders[-1])
    heat.set_ylim(min(low for low, _, _ in bins), max(high for _, high, _ in bins))
    heat.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    heat.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    heat.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:g}}}$")
    heat.set_xlabel("epoch of pruning")
    heat.set_ylabel("|w|")
    figure.colorbar(mesh, ax=[heat, outline], label="weights per bin", pad=0.02, aspect=32)

    _draw_outlines(outline, seen)
    if cuts:
        outline.axhline(cuts[-1][1], color=VERMILLION, linewidth=2)
    outline.set_xlim(0.7, 2 * most)
    for ax in (heat, outline):
        quiet_axes(ax)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8.5, borderaxespad=0)
    return _save(figure, path)


def caption_of(result: Result) -> str:
    """One line below a picture: the title of the recipe, and the data that the numbers come from."""
    return ". ".join(str(result[key]).rstrip(".") for key in ("title", "data") if result.get(key))


def times(total: int, kept: int) -> str:
    """The compression `total / kept`, written as everywhere: `60.0x`."""
    if not kept:
        return "all cut"
    ratio = total / kept
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.1f}x" if ratio < 1000 else f"{ratio:,.0f}x"


def _layers_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["density_if_cut"]))


def _epochs(rows: Sequence[Row]) -> list[int]:
    """The epochs of all rows on one axis, on which the stages follow one another."""
    begins = _begins(rows)
    return [row["epoch"] + begins[row.get("stage")] for row in rows]


def _begins(rows: Sequence[Row]) -> dict[Any, int]:
    """Stage -> number of epochs before it."""
    lengths: dict[Any, int] = {}
    for row in rows:
        lengths[row.get("stage")] = max(row["epoch"], lengths.get(row.get("stage"), 0))
    return dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))


def _series(rows: Sequence[Row], epochs: list[int], key: str) -> tuple[list[int], list[float]]:
    points = [(x, row[key]) for x, row in zip(epochs, rows, strict=True) if row.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _borders(epochs: list[int]) -> list[float]:
    """The vertical borders of a heat map with columns at `epochs`, some of which may be missing."""
    middles = [(a + b) / 2 for a, b in pairwise(epochs)]
    return [epochs[0] - 0.5, *middles, epochs[-1] + 0.5]


def _draw_accuracies(ax: Any, curves: list[tuple[str, str, tuple[list[int], list[float]]]]) -> None:
    for name, colour, (x, y) in curves:
        mark = "o" if len(x) < 30 else ""
        label = f"{name} (last {y[-1]:.2f} %)"
        ax.plot(x, y, color=colour, linewidth=1.8, marker=mark, markersize=3.5, label=label)
    _scale_by_error(ax, [value for _, _, (_, y) in curves for value in y])
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, frameon=False, fontsize=9, borderaxespad=0)


def _scale_by_error(ax: Any, accuracies: list[float]) -> None:
    """Give 98 to 99 % as much room as 80 to 90 %: an axis logarithmic in the error, if the errors are far apart."""
    import numpy as np

    errors = [max(100 - accuracy, _LEAST_ERROR) for accuracy in accuracies]
    least, most = 0.8 * min(errors), min(100, 1.25 * max(errors))
    if max(errors) < 4 * min(errors):
        ax.set_ylabel("test accuracy (%)")
        return
    ticks = [m * 10.0**power for power in range(-2, 3) for m in (1, 2, 3, 5, 7)]
    ax.set_yscale(
        "function",
        functions=(lambda a: -np.log10(np.maximum(100 - a, _LEAST_ERROR / 2)), lambda y: 100 - 10.0**-y),
    )
    shown = [round(100 - error, 2) for error in ticks if least <= error <= most]
    ax.set_yticks(shown, [f"{accuracy:g}" for accuracy in shown])
    ax.set_ylim(100 - most, 100 - least)
    ax.set_ylabel("test accuracy (%),\nlogarithmic in the error")


def _draw_outlines(ax: Any, seen: list[Row]) -> None:
    """Draw the first and the last histogram, sideways."""
    ends = [(seen[0], GREY), (seen[-1], INK)] if len(seen) > 1 else [(seen[0], INK)]
    ax.set_xscale("log")
    for row, colour in ends:
        edges, zeros = row["histogram"]["edges"], row["histogram"].get("zeros")
        counts = [count or 0.1 for count in row["histogram"]["counts"]]  # 0 has no logarithm; 0.1 is off the axis
        label = f"epoch {row['epoch']}" + (f"\n(and {zeros:,} zeros)" if zeros else "")
        ax.stairs(counts, edges, baseline=None, orientation="horizontal", color=colour, lw=1.5, label=label)
    ax.set_xlabel("weights per bin")


def _mark_stages(axes: Any, rows: Sequence[Row]) -> None:
    begins = _begins(rows)
    for stage, begin in begins.items() if len(begins) > 1 else ():
        if begin:
            for ax in axes:
                ax.axvline(begin + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        at, coords = (begin + 0.5, 1), ("data", "axes fraction")
        note(axes[0], str(stage), at, (4, 7), coords=coords, side="left", colour=GREY, size=9)


def new_figure(height: float, title: str, caption: str) -> Any:
    """A figure with a title above and a caption below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    foot = textwrap.fill(caption, 105)
    figure.supxlabel(foot, x=0.012, ha="left", fontsize=8, color="#555555", parse_math=False)
    return figure


def note(
    ax: Any,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float],
    *,
    coords: tuple[str, str],
    side: str = "center",
    colour: str = INK,
    size: float,
) -> None:
    """Write `text` at `at`, shifted by some points; `coords` are matplotlib's names of coordinates."""
    ax.annotate(
        text,
        at,
        shift,
        xycoords=coords,
        textcoords="offset points",
        ha=side,
        va="center",
        color=colour,
        fontsize=size,
    )


def quiet_axes(ax: Any) -> None:
    """Reduce the frame to what helps to read the numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    ax.set_axisbelow(True)
    ax.grid(color=FAINT, linewidth=0.7)


def _shortened(name: str, length: int = 32) -> str:
    """The name with its middle left out: its ends name the block and the layer."""
    return name if len(name) <= length else f"{name[: length // 2 - 2]}...{name[-length // 2 + 1 :]}"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
