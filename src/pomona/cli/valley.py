"""``pomona valley``: do two trained networks lie in the same flat valley?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pomona.cli.train import threads_of
from pomona.pages.text import table


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "valley",
        help="check whether two runs lie in the same flat valley: paths between them, curvature along their difference",
        description="Compare the networks of two finished runs of the same model on the same data, where A is not "
        "pruned: the loss along the segment and along a trained curve from A to B, and how much of B - A lies in the "
        "directions of highest curvature at A. Writes valley.json and valley.png.",
    )
    parser.add_argument("a", metavar="A", type=Path, help="folder of the run without pruning")
    parser.add_argument("b", metavar="B", type=Path, help="folder of the run with pruning")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files (default: $POMONA_DATA)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the result (default: next to B)")
    parser.add_argument(
        "--points",
        metavar="N",
        type=_whole(3),
        default=21,
        help="points on each path, both ends included (default: 21)",
    )
    parser.add_argument(
        "--examples", metavar="N", type=_whole(1), help="training examples of the loss (default: 10,000, or all)"
    )
    parser.add_argument(
        "--hessian", metavar="K", type=_whole(1), default=10, help="top eigenvectors of the Hessian (default: 10)"
    )
    parser.add_argument(
        "--curve-epochs", metavar="N", type=_whole(1), default=5, help="length of the curve's training (default: 5)"
    )
    parser.add_argument(
        "--curve-lr", metavar="LR", type=_positive, default=0.05, help="its learning rate (default: 0.05)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=_whole(0), default=0, help="seed of all random choices (default: 0)"
    )
    parser.add_argument("--threads", metavar="N", type=_whole(1), help="torch threads (default: as B was trained)")
    parser.set_defaults(run=_run)


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be >= {least}, got {value}")
        return value

    return number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.valley import Options, survey
    from pomona.train.progress import Progress

    a, b = options.a, options.b
    out = options.out or b.resolve().with_name(f"valley-{a.resolve().name}-{b.resolve().name}")
    look = Options(
        points=options.points,
        examples=options.examples,
        hessian=options.hessian,
        curve_epochs=options.curve_epochs,
        curve_lr=options.curve_lr,
        seed=options.seed,
    )
    progress = Progress()
    try:
        result = survey(a, b, out, look, data_dir=options.data_dir, threads=threads_of(options, b), progress=progress)
    finally:
        progress.clear()
    print(_described(result))
    print(f"{out / 'valley.json'}\n{out / 'valley.png'}")
    return 0


def _described(result: dict[str, Any]) -> str:
    """Two tables, and their meaning in words."""
    k, size, random = len(result["hessian"]["values"]), result["parameters"], result["random_projection"]
    lines = [
        f"A has {100 * result['A']['sparsity']:.2f} % zeros, B {100 * result['B']['sparsity']:.2f} %; "
        f"{size:,} parameters, |B - A| = {result['distance']:.4g}",
    ]
    rows = [["path from A to B", "loss at A", "at B", "barrier", "at t", "accuracy lost"]]
    for name in ("segment", "curve"):
        path = result[name]
        ends = (f"{path['loss'][path['t'].index(t)]:.4g}" for t in (0.0, 1.0))
        dip = f"{path['test_accuracy_dip']:.2f}"
        rows.append([name, *ends, f"{path['barrier']:.4g}", f"{path['barrier_at']:.3g}", dip])
    lines.append(table(rows, right=range(1, 6)))
    rows = [["direction from A", "length", f"in top {k}", "x random", "curvature", "loss there"]]
    for name, way in result["directions"].items():
        inside = [f"{way['projection']:.4g}", f"{way['projection'] / random:.3g}"]
        rows.append([f"to {name}", f"{way['length']:.4g}", *inside, f"{way['curvature']:.4g}", f"{way['loss']:.4g}"])
    rows.append(["random", "", f"{random:.4g}", "1", "", ""])
    lines.append(table(rows, right=range(1, 6)))
    segment, curve, way = result["segment"], result["curve"], result["directions"]["B"]
    lines += [
        f"On the segment the training loss rises {segment['barrier']:.4g} above the larger end, on the curve "
        f"{curve['barrier']:.4g}; test accuracy falls {segment['test_accuracy_dip']:.2f} and "
        f"{curve['test_accuracy_dip']:.2f} points below the lower end.",
        f"The {k} sharpest directions at A hold {100 * way['projection'] ** 2:.3g} % of the squared length of B - A; "
        f"of a random direction they hold {100 * random**2:.3g} %. The curvature along B - A is "
        f"{way['curvature']:.4g}, the largest there is {result['hessian']['values'][0]:.4g}.",
    ]
    return "\n".join(lines)
