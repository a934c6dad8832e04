"""The picture of a valley: loss and accuracy on the two paths, and B - A in the sharpest directions."""

from __future__ import annotations

import math
from typing import Any, BinaryIO

from pomona.pages.pictures import BLUE, GREY, INK, VERMILLION, new_figure, note, quiet_axes

_LOOKS = {  # name of a direction -> label, colour, marker
    "B": ("B - A", VERMILLION, "o"),
    "magnitude pruning of A": ("magnitude pruning of A", BLUE, "s"),
    "random pruning of A": ("random pruning of A", GREY, "^"),
}


def draw_valley(result: dict[str, Any], file: BinaryIO) -> None:
    """Draw valley.png from the content of valley.json."""
    caption = f"A: {_name(result['A'])}. B: {_name(result['B'])}. Loss on {result['options']['examples']:,} training "
    figure = new_figure(5.0, "From A to B: what the loss does on the way", f"{caption}examples of {result['data']}")
    places = [["loss", "top"], ["accuracy", "top"]]
    axes = figure.subplot_mosaic(places, width_ratios=[1.25, 1], height_ratios=[1.5, 1])
    for ax in axes.values():
        quiet_axes(ax)
    _draw_paths(axes["loss"], axes["accuracy"], result)
    _draw_projections(axes["top"], result)
    figure.savefig(file, format="png")


def _name(run: dict[str, Any]) -> str:
    zeros = f", {100 * run['sparsity']:.3g} % zeros" if run["sparsity"] else ""
    return f"{str(run['title']).rstrip('.')}, seed {run['seed']}{zeros}"


def _draw_paths(loss: Any, accuracy: Any, result: dict[str, Any]) -> None:
    for name, colour in (("segment", BLUE), ("curve", VERMILLION)):
        path = result[name]
        label = f"{name} (barrier {path['barrier']:.3g})"
        loss.plot(path["t"], path["loss"], color=colour, marker="o", markersize=2.5, linewidth=1.5, label=label)
        accuracy.plot(path["t"], path["test_accuracy"], color=colour, marker="o", markersize=2.5, linewidth=1.5)
    losses = [*result["segment"]["loss"], *result["curve"]["loss"]]
    if max(losses) > 10 * min(losses) > 0:
        loss.set_yscale("log")
    loss.set_ylabel("training loss")
    loss.tick_params(labelbottom=False)
    loss.legend(loc="lower left", bbox_to_anchor=(0, 1.08), frameon=False, fontsize=8.5, borderaxespad=0)
    accuracy.set_ylabel("test accuracy (%)")
    accuracy.set_xlabel("t")
    for ax in (loss, accuracy):
        ax.set_xlim(result["segment"]["t"][0], result["segment"]["t"][-1])
        for t in (0, 1):
            ax.axvline(t, color=GREY, linewidth=0.8, linestyle=":")
    for t, name in ((0, "A"), (1, "B")):
        note(loss, name, (t, 1), (0, 6), coords=("data", "axes fraction"), size=9)


def _draw_projections(ax: Any, result: dict[str, Any]) -> None:
    k = len(result["hessian"]["values"])
    places = range(1, k + 1)
    seen = [1 / math.sqrt(result["parameters"])]
    for name, direction in result["directions"].items():
        label, colour, mark = _LOOKS[name]
        values = [value or math.nan for value in direction["coordinates"]]
        ax.plot(places, values, color=colour, marker=mark, markersize=5, linestyle="", label=label)
        seen += [value for value in direction["coordinates"] if value]
    ax.axhline(seen[0], color=INK, linewidth=1.2, linestyle="--", label="random direction (r.m.s.)")
    ax.set_yscale("log")
    ax.set_ylim(10 ** math.floor(math.log10(min(seen))), 10 ** math.ceil(math.log10(max(seen))))
    ax.set_xlim(0.5, k + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.set_xlabel("eigenvector at A, sharpest first")
    ax.set_ylabel("|cosine| with the eigenvector")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.01), frameon=False, fontsize=8.5, borderaxespad=0)
